//! Payloads that can be recognised, and texts that should not hold them. All payloads of a run begin with the same
//! bytes; whoever finds those in a status text, in whatever form programs print bytes, has found a payload. They
//! protect nothing, so they need not be random.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// No text, no number, and a multiple of three, so that its base64 ends with it.
const MARK: [u8; 12] = [0xd3, 0x1e, 0x9b, 0xf4, 0x07, 0xc2, 0x85, 0x6a, 0xee, 0x10, 0xb9, 0x5d];

/// The payload with this number: the mark, the number, and then bytes that follow from it.
pub(super) fn payload(number: u64, length: usize) -> Vec<u8> {
    let fill = (0..).map(|place: u64| {
        let mixed = (number << 32 | place).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed ^ mixed >> 29).to_le_bytes()[2]
    });
    MARK.into_iter().chain(number.to_be_bytes()).chain(fill).take(length).collect()
}

pub(super) fn holds_a_payload(text: &str) -> bool {
    let hex: String = MARK.iter().map(|byte| format!("{byte:02x}")).collect();
    let numbers = |between: &str| MARK.map(|byte| byte.to_string()).join(between);
    text.contains(&STANDARD.encode(MARK))
        || text.to_ascii_lowercase().contains(&hex)
        || text.contains(&numbers(", "))
        || text.contains(&numbers(" "))
        || text.contains(&*String::from_utf8_lossy(&MARK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_found_however_it_is_printed() {
        let payload = payload(7, 32);
        let hex: String = payload.iter().map(|byte| format!("{byte:02X}")).collect();
        let go = payload.iter().map(u8::to_string).collect::<Vec<_>>().join(" ");
        for text in [
            format!("cannot open {payload:?}"),
            format!("0x{hex}!"),
            format!("[{go}]"),
            STANDARD.encode(&payload),
            String::from_utf8_lossy(&payload).into_owned(),
        ] {
            assert!(holds_a_payload(&text), "{text}");
        }
        assert!(!holds_a_payload("the value does not authenticate"));
    }

    #[test]
    fn payloads_have_their_length_and_differ() {
        let mut all: Vec<_> = (0..1000).map(|number| payload(number, 32)).collect();
        all.dedup();
        assert_eq!(all.len(), 1000);
        assert!([0, 1, 33, 4097].iter().all(|length| payload(1, *length).len() == *length));
    }
}
