//! Log lines as operators of the plug-in know them, one JSON object each:
//! `{"level":"info","ts":"Oct 29 22:55:01.615","msg":"server.rs:140: The Provider server is started."}`
//!
//! Secrets have no `Display` and no useful `Debug`, so they cannot get here. Wrapped values and request
//! fields may: they are logged under the target [`VALUES`], which is silent unless LOG_ALL_VALUES is true.

use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use time::OffsetDateTime;
use time::macros::format_description;
use tracing::field::{Field, Visit};
use tracing::span;
use tracing::subscriber::{Interest, SetGlobalDefaultError, Subscriber};
use tracing::{Event, Level, Metadata};

/// The target of lines that show wrapped values and request fields:
/// `tracing::info!(target: VALUES, uid, "...")`.
pub const VALUES: &str = "values";

/// How much is logged. `Debug` includes all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
}

/// Where "now" comes from.
pub type Wall = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// What the LOGGER section of a configuration file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    pub level: LogLevel,
    pub log_all_values: bool,
}

/// Changes the settings while the process runs.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Switches>);

/// Logs to standard error from now on, for the whole process. A panic becomes a line, too.
///
/// # Errors
/// If the process already has a log.
pub fn init(settings: Settings, wall: Wall) -> Result<Handle, SetGlobalDefaultError> {
    let (log, handle) = Log::new(settings, wall, Box::new(io::stderr()));
    tracing::subscriber::set_global_default(log)?;
    std::panic::set_hook(Box::new(|panic| tracing::error!("panic: {panic}")));
    Ok(handle)
}

impl Handle {
    pub fn change(&self, settings: Settings) {
        self.0.level.store(settings.level as u8, Ordering::Relaxed);
        self.0.all_values.store(settings.log_all_values, Ordering::Relaxed);
    }
}

impl LogLevel {
    pub const NAMES: [&str; 4] = ["error", "warn", "info", "debug"];

    pub fn name(self) -> &'static str {
        match self {
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
        }
    }

    /// `None` if `name` is not one of [`LogLevel::NAMES`]; upper and lower case are one.
    pub fn parse(name: &str) -> Option<LogLevel> {
        match name.to_ascii_lowercase().as_str() {
            "error" => Some(LogLevel::Error),
            "warn" => Some(LogLevel::Warn),
            "info" => Some(LogLevel::Info),
            "debug" => Some(LogLevel::Debug),
            _ => None,
        }
    }
}

/// Bytes for a log line: as they are if they are printable ASCII, else in hexadecimal.
#[derive(Debug, Clone, Copy)]
pub struct Shown<'a>(pub &'a [u8]);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match std::str::from_utf8(self.0) {
            Ok(text) if self.0.iter().all(u8::is_ascii_graphic) => f.write_str(text),
            _ => self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}")),
        }
    }
}

/// Writes events as lines. Spans are not recorded: a request's lines carry its uid as a field.
pub struct Log {
    switches: Arc<Switches>,
    wall: Wall,
    out: Mutex<Box<dyn Write + Send>>,
}

#[derive(Debug)]
struct Switches {
    level: AtomicU8,
    all_values: AtomicBool,
}

impl Log {
    pub fn new(settings: Settings, wall: Wall, out: Box<dyn Write + Send>) -> (Log, Handle) {
        let switches = Arc::new(Switches {
            level: AtomicU8::new(settings.level as u8),
            all_values: AtomicBool::new(settings.log_all_values),
        });
        let log = Log { switches: switches.clone(), wall, out: Mutex::new(out) };
        (log, Handle(switches))
    }

    fn line(&self, event: &Event<'_>) -> String {
        let mut msg = String::with_capacity(128);
        if let (Some(file), Some(line)) = (event.metadata().file(), event.metadata().line()) {
            let name = file.rsplit('/').next().unwrap_or(file);
            // Writing into a String cannot fail.
            let _ = write!(msg, "{name}:{line}: ");
        }
        let mut fields = Fields { message: String::new(), rest: String::new() };
        event.record(&mut fields);
        msg.push_str(&fields.message);
        msg.push_str(&fields.rest);
        let level = event.metadata().level().as_str().to_ascii_lowercase();
        let ts = stamp((self.wall)());
        let msg = serde_json::Value::String(msg);
        format!("{{\"level\":\"{level}\",\"ts\":\"{ts}\",\"msg\":{msg}}}\n")
    }
}

impl Subscriber for Log {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        match metadata.is_event() {
            // These depend on switches that change while the process runs.
            true if is_ours(metadata) => Interest::sometimes(),
            true if rank(*metadata.level()) <= WARN => Interest::always(),
            _ => Interest::never(),
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        if metadata.target() == VALUES {
            return self.switches.all_values.load(Ordering::Relaxed);
        }
        let wanted =
            if is_ours(metadata) { self.switches.level.load(Ordering::Relaxed) } else { WARN };
        metadata.is_event() && rank(*metadata.level()) <= wanted
    }

    fn event(&self, event: &Event<'_>) {
        let line = self.line(event);
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        // If the log cannot be written there is nowhere left to say so.
        let _ = out.write_all(line.as_bytes());
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

const WARN: u8 = LogLevel::Warn as u8;

/// The libraries' own chatter below a warning is not for operators, and some of it (headers, frames)
/// would show what a secret's Debug hides.
fn is_ours(metadata: &Metadata<'_>) -> bool {
    metadata.target() == VALUES || metadata.target().starts_with("kms")
}

fn rank(level: Level) -> u8 {
    match level {
        Level::ERROR => LogLevel::Error as u8,
        Level::WARN => LogLevel::Warn as u8,
        Level::INFO => LogLevel::Info as u8,
        Level::DEBUG => LogLevel::Debug as u8,
        _ => u8::MAX,
    }
}

/// `Oct 29 22:55:01.615`, in UTC; a day below ten is padded with a space.
fn stamp(now: SystemTime) -> String {
    let format = format_description!(
        "[month repr:short] [day padding:space] [hour]:[minute]:[second].[subsecond digits:3]"
    );
    OffsetDateTime::from(now).format(format).unwrap_or_default()
}

struct Fields {
    message: String,
    rest: String,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.rest, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tracing::subscriber::with_default;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Kept {
        fn lines(&self) -> Vec<String> {
            let bytes = self.0.lock().unwrap().clone();
            String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect()
        }
    }

    fn log(level: LogLevel, log_all_values: bool) -> (Log, Handle, Kept) {
        let kept = Kept::default();
        let wall: Wall =
            Arc::new(|| SystemTime::UNIX_EPOCH + Duration::from_millis(1_572_389_701_615));
        let (log, handle) =
            Log::new(Settings { level, log_all_values }, wall, Box::new(kept.clone()));
        (log, handle, kept)
    }

    #[test]
    fn a_line_looks_as_in_the_seed() {
        let (log, _, kept) = log(LogLevel::Info, false);
        let line = line!() + 1;
        with_default(log, || tracing::info!("The Provider server is started."));
        assert_eq!(
            kept.lines(),
            [format!(
                r#"{{"level":"info","ts":"Oct 29 22:55:01.615","msg":"telemetry.rs:{line}: The Provider server is started."}}"#
            )]
        );
    }

    #[test]
    fn a_day_below_ten_is_padded_with_a_space() {
        assert_eq!(stamp(SystemTime::UNIX_EPOCH), "Jan  1 00:00:00.000");
    }

    #[test]
    fn fields_follow_the_text_and_the_whole_is_valid_json() {
        let (log, _, kept) = log(LogLevel::Info, false);
        with_default(log, || tracing::warn!(uid = "a\"b\nc", count = 3, "two\nlines"));
        let lines = kept.lines();
        assert_eq!(lines.len(), 1);
        let line: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
        let msg = line["msg"].as_str().unwrap();
        assert_eq!(line["level"], "warn");
        assert!(msg.ends_with(": two\nlines uid=a\"b\nc count=3"), "{msg}");
    }

    #[test]
    fn the_level_changes_while_the_process_runs() {
        let (log, handle, kept) = log(LogLevel::Info, false);
        with_default(log, || {
            for level in [LogLevel::Info, LogLevel::Debug, LogLevel::Error] {
                handle.change(Settings { level, log_all_values: false });
                tracing::debug!("debug at {level:?}");
                tracing::info!("info at {level:?}");
                tracing::error!("error at {level:?}");
            }
        });
        let texts: Vec<_> = kept
            .lines()
            .iter()
            .map(|line| line.rsplit(": ").next().unwrap().trim_end_matches("\"}").to_owned())
            .collect();
        assert_eq!(
            texts,
            [
                "info at Info",
                "error at Info",
                "debug at Debug",
                "info at Debug",
                "error at Debug",
                "error at Error"
            ]
        );
    }

    #[test]
    fn values_are_shown_only_when_asked_for_and_libraries_only_when_they_warn() {
        let (log, handle, kept) = log(LogLevel::Debug, false);
        with_default(log, || {
            tracing::info!(target: VALUES, wdek = %Shown(b"eyJ"), "hidden");
            tracing::debug!(target: "h2::codec", "frames");
            handle.change(Settings { level: LogLevel::Info, log_all_values: true });
            tracing::info!(target: VALUES, wdek = %Shown(b"eyJ"), raw = %Shown(&[0, 255]), "shown");
            tracing::warn!(target: "rustls", "careful");
        });
        let lines = kept.lines();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].contains("shown wdek=eyJ raw=00ff"), "{lines:?}");
        assert!(lines[1].contains("careful"), "{lines:?}");
    }

    #[test]
    fn level_names_are_read_in_any_case() {
        assert_eq!(LogLevel::parse("INFO"), Some(LogLevel::Info));
        assert_eq!(LogLevel::parse("loud"), None);
        assert!(LogLevel::NAMES.iter().all(|name| LogLevel::parse(name).is_some()));
    }
}
