//! Turns proto/*.proto into Rust. protox compiles them, so no protoc is needed on the machine, and only what the
//! enabled features ask for is generated.

use std::error::Error;

const FILES: [&str; 3] = ["proto/v1beta1.proto", "proto/v2.proto", "proto/etcd.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["proto"])?;
    tonic_prost_build::configure()
        .build_server(cfg!(feature = "grpc-server"))
        .build_client(cfg!(feature = "grpc-client"))
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}
