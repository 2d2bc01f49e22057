//! When a certificate ends: the one thing in it that an operator wants to see long before TLS does. Trust is decided
//! elsewhere, by rustls.

use std::time::{Duration, SystemTime, UNIX_EPOCH};
use time::{Date, Month, Time};

const SEQUENCE: u8 = 0x30;
const VERSION: u8 = 0xa0;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;

/// `notAfter` of the X.509 certificate in `der` (RFC 5280, 4.1.2.5); `None` where it cannot be found.
#[must_use]
pub fn not_after(der: &[u8]) -> Option<SystemTime> {
    let (certificate, _) = expect(SEQUENCE, der)?;
    let (mut rest, _) = expect(SEQUENCE, certificate)?;
    if let Some((_, behind)) = expect(VERSION, rest) {
        rest = behind;
    }
    // Serial number, signature algorithm, issuer.
    for _ in 0..3 {
        rest = element(rest)?.2;
    }
    let (validity, _) = expect(SEQUENCE, rest)?;
    let (_, _, rest) = element(validity)?;
    match element(rest)? {
        (UTC_TIME, text, _) => {
            let (year, rest) = number(text, 2)?;
            // Two digits mean 1950 to 2049.
            moment(if year < 50 { 2000 + year } else { 1900 + year }, rest)
        }
        (GENERALIZED_TIME, text, _) => {
            let (year, rest) = number(text, 4)?;
            moment(year, rest)
        }
        _ => None,
    }
}

fn expect(tag: u8, bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    element(bytes).and_then(|(found, content, rest)| (found == tag).then_some((content, rest)))
}

/// Tag, content, and what stands behind.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, mut rest) = rest.split_first()?;
    let mut len = usize::from(first);
    if first >= 0x80 {
        let (digits, behind) = rest.split_at_checked(usize::from(first & 0x7f))?;
        // No certificate has 4 GiB.
        if digits.is_empty() || digits.len() > 4 {
            return None;
        }
        len = digits.iter().try_fold(0usize, |sum, digit| {
            sum.checked_mul(256)?.checked_add(usize::from(*digit))
        })?;
        rest = behind;
    }
    let (content, rest) = rest.split_at_checked(len)?;
    Some((tag, content, rest))
}

/// `MMDDHHMMSSZ` behind the year.
fn moment(year: u32, text: &[u8]) -> Option<SystemTime> {
    let (month, rest) = number(text, 2)?;
    let (day, rest) = number(rest, 2)?;
    let (hour, rest) = number(rest, 2)?;
    let (minute, rest) = number(rest, 2)?;
    let (second, rest) = number(rest, 2)?;
    if rest != b"Z" {
        return None;
    }
    let small = |number: u32| u8::try_from(number).ok();
    let month = Month::try_from(small(month)?).ok()?;
    let date = Date::from_calendar_date(i32::try_from(year).ok()?, month, small(day)?).ok()?;
    let time = Time::from_hms(small(hour)?, small(minute)?, small(second)?).ok()?;
    let seconds = date.with_time(time).assume_utc().unix_timestamp();
    UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(seconds).ok()?))
}

fn number(text: &[u8], digits: usize) -> Option<(u32, &[u8])> {
    let (number, rest) = text.split_at_checked(digits)?;
    let value = number.iter().try_fold(0, |sum: u32, digit| {
        digit.is_ascii_digit().then(|| sum * 10 + u32::from(digit - b'0'))
    })?;
    Some((value, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn certificate(year: i32) -> Vec<u8> {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut certificate = rcgen::CertificateParams::new(vec!["kms".into()]).unwrap();
        certificate.not_after = rcgen::date_time_ymd(year, 2, 3);
        certificate.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn the_end_is_found_in_both_forms_of_time() {
        // UTCTime until 2049, GeneralizedTime from 2050.
        for (year, seconds) in [(2027, 1_801_612_800), (2055, 2_685_225_600)] {
            let end = not_after(&certificate(year)).unwrap();
            assert_eq!(end, UNIX_EPOCH + Duration::from_secs(seconds), "{year}");
        }
    }

    #[test]
    fn a_certificate_that_is_cut_short_has_no_end() {
        let whole = certificate(2027);
        for len in 0..whole.len() {
            assert_eq!(not_after(&whole[..len]), None, "{len} bytes");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_have_an_end_or_none(bytes: Vec<u8>, at: u16, other: u8) {
            let _ = not_after(&bytes);
            let mut changed = certificate(2027);
            let at = usize::from(at) % changed.len();
            changed[at] = other;
            let _ = not_after(&changed);
        }
    }
}
