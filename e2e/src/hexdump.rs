//! Bytes as `hexdump -C` prints them: the form in which the original's documentation shows what is in etcd.

/// Sixteen bytes a line: offset, hexadecimal, printable characters; runs of equal lines become `*`.
pub fn canonical(bytes: &[u8]) -> String {
    let mut text = String::new();
    let mut previous: Option<&[u8]> = None;
    let mut starred = false;
    for (index, line) in bytes.chunks(LINE).enumerate() {
        if previous == Some(line) {
            if !starred {
                text.push_str("*\n");
            }
            starred = true;
            continue;
        }
        (previous, starred) = (Some(line), false);
        push_line(&mut text, index * LINE, line);
    }
    text.push_str(&format!("{:08x}\n", bytes.len()));
    text
}

const LINE: usize = 16;

fn push_line(text: &mut String, offset: usize, line: &[u8]) {
    let hex: String = line
        .iter()
        .enumerate()
        .map(|(index, byte)| format!("{}{byte:02x} ", if index == LINE / 2 { " " } else { "" }))
        .collect();
    let shown: String = line
        .iter()
        .map(|&byte| if (0x20..0x7f).contains(&byte) { char::from(byte) } else { '.' })
        .collect();
    text.push_str(&format!("{offset:08x}  {hex:<49} |{shown}|\n"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_as_in_the_seed() {
        let start = b"/registry/secrets/default/secret1\nk8s:enc:kms:v1:KmsPlugin:\x02t";
        let expected = "\
00000000  2f 72 65 67 69 73 74 72  79 2f 73 65 63 72 65 74  |/registry/secret|
00000010  73 2f 64 65 66 61 75 6c  74 2f 73 65 63 72 65 74  |s/default/secret|
00000020  31 0a 6b 38 73 3a 65 6e  63 3a 6b 6d 73 3a 76 31  |1.k8s:enc:kms:v1|
00000030  3a 4b 6d 73 50 6c 75 67  69 6e 3a 02 74           |:KmsPlugin:.t|
0000003d
";
        assert_eq!(canonical(start), expected);
    }

    #[test]
    fn short_and_repeated_lines() {
        assert_eq!(canonical(b""), "00000000\n");
        let expected = "\
00000000  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|
*
00000030  41                                                |A|
00000031
";
        let mut bytes = vec![0; 48];
        bytes.push(b'A');
        assert_eq!(canonical(&bytes), expected);
    }
}
