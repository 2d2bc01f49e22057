//! The control file: one fault a line. Empty lines and lines that start with `#` mean nothing.
//!
//! ```text
//! fail  C_Encrypt CKR_DEVICE_ERROR after=2 times=1   the third C_Encrypt fails, the others do not
//! fail  *         0x80000401 every=10                every tenth call of any function
//! fail  C_GenerateKey CKR_DEVICE_ERROR late          the key is made, and the answer lost
//! delay C_Sign    50                                 milliseconds
//! hang  C_Decrypt                                    until this line is gone
//! crash C_Encrypt segv                               or abort
//! crash C_Sign    segv once                          the process that comes next finds no control file
//! kill  C_Encrypt late                               SIGKILL to this process: `late` after the module has done it
//! sessions die                                       every session that is open now
//! sessions at-most 2
//! token gone                                         until this line is gone; its sessions die
//! token serial 4711                                  says that it is another one
//! objects twice                                      every search shows each object twice
//! attribute 0x162 01                                 every object has this value (hex) of this attribute
//! iv appended                                        AES-GCM: the HSM makes the IV and appends it; `strict` refuses one
//! iv filled                                          AES-GCM: the HSM fills the IV buffer, which must be zero
//! iv appended same                                   the same one each time; `iv filled same` as well
//! ```
//!
//! `after`, `times` and `every` count calls from the moment at which the file changed.

use crate::codes::code;
use crate::functions::Function;
use cryptoki_sys::{CK_ATTRIBUTE_TYPE, CK_RV};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// Writes a control file, for tests.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
    written: AtomicUsize,
}

/// What a control file says.
#[derive(Debug, Default)]
pub(crate) struct Orders {
    pub(crate) faults: Vec<Fault>,
    pub(crate) kill_sessions: bool,
    pub(crate) most_sessions: Option<usize>,
    pub(crate) token_gone: bool,
    pub(crate) serial: Option<String>,
    pub(crate) objects_twice: bool,
    pub(crate) lies: Vec<(CK_ATTRIBUTE_TYPE, Vec<u8>)>,
    pub(crate) iv: IvMode,
}

/// How the token treats the IV of AES-GCM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum IvMode {
    /// As the real one does.
    #[default]
    AsIs,
    /// Makes it and appends it to the ciphertext.
    Appended { strict: bool, same: bool },
    /// Makes it and writes it into the caller's buffer.
    Filled { same: bool },
}

/// One line about calls.
#[derive(Debug)]
pub(crate) struct Fault {
    /// `None`: any.
    function: Option<Function>,
    pub(crate) effect: Effect,
    /// Only after the real module has done its work.
    pub(crate) late: bool,
    /// Removes the control file before it strikes.
    pub(crate) once: bool,
    after: u64,
    times: u64,
    every: u64,
    seen: AtomicU64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    Fail(CK_RV),
    Delay(Duration),
    Hang,
    Segv,
    Abort,
    Kill,
}

/// A line that means nothing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the control file: {what}")]
pub struct Mistake {
    line: usize,
    what: &'static str,
}

impl Control {
    /// The writer of the file at `path`.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), written: AtomicUsize::new(0) }
    }

    /// Replaces all faults, at once for every call that begins afterwards.
    ///
    /// # Errors
    /// The file cannot be written, or `text` has a line that means nothing.
    pub fn set(&self, text: &str) -> std::io::Result<()> {
        Orders::parse(text).map_err(std::io::Error::other)?;
        // A file system's clock ticks in milliseconds and inodes are used again, so each version has another length.
        let version = self.written.fetch_add(1, Ordering::Relaxed) % 4096;
        let text = format!("{text}\n#{:version$}\n", "");
        let new = self.path.with_extension("new");
        std::fs::write(&new, text)?;
        std::fs::rename(&new, &self.path)
    }

    /// No faults any more.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn clear(&self) -> std::io::Result<()> {
        self.set("")
    }
}

impl Fault {
    /// Whether it strikes at this call of `function`; counts.
    pub(crate) fn strikes(&self, function: Function) -> bool {
        if self.function.is_some_and(|only| only != function) {
            return false;
        }
        let seen = self.seen.fetch_add(1, Ordering::Relaxed);
        let Some(due) = seen.checked_sub(self.after) else { return false };
        due.is_multiple_of(self.every) && due / self.every < self.times
    }
}

impl Orders {
    /// # Errors
    /// The first line that means nothing.
    pub(crate) fn parse(text: &str) -> Result<Self, Mistake> {
        let mut orders = Self::default();
        for (number, line) in text.lines().enumerate() {
            let words: Vec<&str> = line.split_whitespace().collect();
            if words.first().is_some_and(|first| !first.starts_with('#')) {
                orders.take(&words).map_err(|what| Mistake { line: number + 1, what })?;
            }
        }
        Ok(orders)
    }

    fn take(&mut self, words: &[&str]) -> Result<(), &'static str> {
        match words {
            ["fail", function, name, counts @ ..] => {
                let code = code(name).ok_or("no such return code")?;
                self.faults.push(fault(function, Effect::Fail(code), counts)?);
            }
            ["delay", function, millis, counts @ ..] => {
                let time = Duration::from_millis(number(millis)?);
                self.faults.push(fault(function, Effect::Delay(time), counts)?);
            }
            ["hang", function, counts @ ..] => {
                self.faults.push(fault(function, Effect::Hang, counts)?);
            }
            ["crash", function, "segv", counts @ ..] => {
                self.faults.push(fault(function, Effect::Segv, counts)?);
            }
            ["crash", function, "abort", counts @ ..] => {
                self.faults.push(fault(function, Effect::Abort, counts)?);
            }
            ["kill", function, counts @ ..] => {
                self.faults.push(fault(function, Effect::Kill, counts)?);
            }
            ["sessions", "die"] => self.kill_sessions = true,
            ["sessions", "at-most", most] => {
                self.most_sessions = Some(usize::try_from(number(most)?).unwrap_or(usize::MAX));
            }
            ["token", "gone"] => self.token_gone = true,
            ["token", "serial", serial] => self.serial = Some((*serial).to_owned()),
            ["objects", "twice"] => self.objects_twice = true,
            ["attribute", kind, value] => {
                let kind = kind.strip_prefix("0x").ok_or("an attribute's number starts with 0x")?;
                let kind = CK_ATTRIBUTE_TYPE::from_str_radix(kind, 16).map_err(|_| "no number")?;
                self.lies.push((kind, bytes(value)?));
            }
            ["iv", mode @ ..] => self.iv = iv(mode)?,
            _ => return Err("unknown words"),
        }
        Ok(())
    }
}

fn fault(function: &str, effect: Effect, counts: &[&str]) -> Result<Fault, &'static str> {
    let function = match function {
        "*" => None,
        name => {
            let known = Function::ALL.iter().find(|function| function.name() == name);
            Some(*known.ok_or("no such function")?)
        }
    };
    let seen = AtomicU64::new(0);
    let mut fault = Fault {
        function,
        effect,
        late: false,
        once: false,
        after: 0,
        times: u64::MAX,
        every: 1,
        seen,
    };
    for count in counts {
        match count.split_once('=') {
            Some(("after", count)) => fault.after = number(count)?,
            Some(("times", count)) => fault.times = number(count)?,
            Some(("every", count)) => fault.every = number(count)?.max(1),
            None if *count == "late" => fault.late = true,
            None if *count == "once" => fault.once = true,
            _ => return Err("only after=, times=, every=, late and once may follow"),
        }
    }
    Ok(fault)
}

fn iv(words: &[&str]) -> Result<IvMode, &'static str> {
    let same = words.last() == Some(&"same");
    match words {
        ["appended"] | ["appended", "same"] => Ok(IvMode::Appended { strict: false, same }),
        ["appended", "strict"] => Ok(IvMode::Appended { strict: true, same }),
        ["filled"] | ["filled", "same"] => Ok(IvMode::Filled { same }),
        _ => Err("no such IV mode"),
    }
}

fn number(text: &str) -> Result<u64, &'static str> {
    text.parse().map_err(|_| "no number")
}

fn bytes(hex: &str) -> Result<Vec<u8>, &'static str> {
    let digits: Option<Vec<u32>> = hex.chars().map(|digit| digit.to_digit(16)).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0).ok_or("a value is hex")?;
    digits.chunks(2).map(|pair| u8::try_from(pair[0] * 16 + pair[1]).map_err(|_| "hex")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn strikes(line: &str, function: Function, calls: usize) -> Vec<bool> {
        let orders = Orders::parse(line).unwrap();
        (0..calls).map(|_| orders.faults[0].strikes(function)).collect()
    }

    #[test]
    fn counts_say_which_calls_are_struck() {
        let (t, f) = (true, false);
        let of = |counts: &str| {
            strikes(&format!("fail C_Sign CKR_CANCEL {counts}"), Function::C_Sign, 6)
        };
        assert_eq!(of(""), [t, t, t, t, t, t]);
        assert_eq!(of("times=1"), [t, f, f, f, f, f]);
        assert_eq!(of("after=2 times=1"), [f, f, t, f, f, f]);
        assert_eq!(of("every=2"), [t, f, t, f, t, f]);
        assert_eq!(of("after=1 every=2 times=2"), [f, t, f, t, f, f]);
        assert_eq!(strikes("hang C_Sign", Function::C_Encrypt, 1), [f]);
        assert_eq!(strikes("hang *", Function::C_Encrypt, 1), [t]);
    }

    #[test]
    fn every_line_of_the_description_is_understood() {
        let lines = include_str!("control.rs").lines().filter_map(|line| line.strip_prefix("//! "));
        let block = lines.skip_while(|line| *line != "```text").skip(1);
        let mut told = 0;
        for line in block.take_while(|line| *line != "```") {
            // The words behind two spaces or more tell people what it does.
            let order = line.replacen("  ", " ", 1);
            let order = order.split("  ").next().unwrap_or_default().trim();
            let order = match order {
                "delay C_Sign" => "delay C_Sign 50",
                "crash C_Sign" => "crash C_Sign segv once",
                "fail *" => "fail * 0x80000401 every=10",
                whole => whole,
            };
            assert!(Orders::parse(order).is_ok(), "{order}: {:?}", Orders::parse(order));
            told += 1;
        }
        assert_eq!(told, 17);
    }

    #[test]
    fn what_means_nothing_is_named_by_its_line() {
        for (text, what) in [
            ("\nfail C_Sing CKR_CANCEL", "no such function"),
            ("\nfail C_Sign CKR_TIRED", "no such return code"),
            ("\nfail C_Sign CKR_CANCEL 3", "only after=, times=, every=, late and once may follow"),
            ("\ntoken lost", "unknown words"),
            ("\nattribute 0x162 1", "a value is hex"),
            ("\niv random", "no such IV mode"),
        ] {
            assert_eq!(Orders::parse(text).unwrap_err(), Mistake { line: 2, what });
        }
    }

    proptest! {
        #[test]
        fn any_text_is_orders_or_a_mistake(text in "\\PC{0,80}") {
            let _ = Orders::parse(&text);
        }
    }
}
