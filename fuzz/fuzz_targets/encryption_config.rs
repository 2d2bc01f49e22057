//! Any file given as kube-apiserver's EncryptionConfiguration: read or refused; each block has a writer.
#![no_main]

use kmsctl::source::encryption_config::EncryptionConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(config) = EncryptionConfig::parse(text) {
        for block in &config.blocks {
            let _ = block.writer();
            assert!(config.block_of(&block.resources[0]).is_some());
        }
    }
});
