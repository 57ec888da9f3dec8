//! What `tern serve` says to a service manager: that it serves, that it ends, that it lives; and its log to the journal.
//!
//! The protocol is sd_notify(3): lines in a datagram to the socket that `NOTIFY_SOCKET` names. Without one nothing is said.

use std::io;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::{Format, Full, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// The socket of the service manager that started this process.
pub(super) struct Manager {
    socket: Option<UnixDatagram>,
    /// It takes the service for hung after this long without a sign of life.
    patience: Option<Duration>,
}

impl Manager {
    /// Finds it, if there is one.
    pub(super) fn find() -> Self {
        let variable = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
        let socket = variable("NOTIFY_SOCKET").and_then(|name| {
            let connected = connect(&name);
            connected
                .inspect_err(|error| {
                    tracing::warn!(%error, name, "the service manager (NOTIFY_SOCKET) hears nothing");
                })
                .ok()
        });
        Self {
            socket,
            patience: patience(variable("WATCHDOG_USEC"), variable("WATCHDOG_PID")),
        }
    }

    /// All roles serve.
    pub(super) fn ready(&self) {
        self.say("READY=1\nSTATUS=Serving");
    }

    /// The end has begun.
    pub(super) fn stopping(&self) {
        self.say("STOPPING=1\nSTATUS=Ending; Machines go on");
    }

    /// Gives signs of life for as long as it is polled: from the runtime's own tasks, so that they stop when those do.
    pub(super) async fn stay_alive(&self) {
        let Some(patience) = self.patience else {
            return std::future::pending().await;
        };
        // Half of it, as sd_watchdog_enabled(3) advises.
        let mut ticks = tokio::time::interval(patience / 2);
        loop {
            ticks.tick().await;
            self.say("WATCHDOG=1");
        }
    }

    fn say(&self, what: &str) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = socket.send(what.as_bytes()) {
            tracing::warn!(%error, "the service manager was not told: {}", what.replace('\n', ", "));
        }
    }
}

fn connect(name: &str) -> io::Result<UnixDatagram> {
    let address = match name.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    // A manager that does not read must not hold the server up.
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// What `WATCHDOG_USEC` asks of this process; `WATCHDOG_PID` says whether it is meant for another.
fn patience(microseconds: Option<String>, pid: Option<String>) -> Option<Duration> {
    let own = pid.is_none_or(|pid| pid == std::process::id().to_string());
    let microseconds = microseconds?.parse().ok().filter(|us| *us > 1 && own)?;
    Some(Duration::from_micros(microseconds))
}

/// Whether standard error is the journal: `JOURNAL_STREAM` has the device and inode of its socket (systemd.exec(5)).
pub(super) fn logs_to_journal() -> bool {
    let named = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    is_stream(&named, io::stderr())
}

fn is_stream(named: &str, file: impl AsFd) -> bool {
    let stat = nix::sys::stat::fstat(file);
    stat.is_ok_and(|stat| named == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Lines for the journal, which has the time itself: the level in front of each as sd-daemon(3) has it, so that
/// `journalctl -p warning` finds it.
pub(super) struct Journal(Format<Full, ()>);

impl Journal {
    pub(super) fn new() -> Self {
        Self(Format::default().without_time().with_level(false))
    }
}

impl<S, N> FormatEvent<S, N> for Journal
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        write!(writer, "<{priority}>")?;
        self.0.format_event(context, writer, event)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn heard(by: &UnixDatagram) -> String {
        let mut buffer = [0; 256];
        let length = by.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    fn manager(name: &str, patience: Option<Duration>) -> Manager {
        Manager {
            socket: Some(connect(name).unwrap()),
            patience,
        }
    }

    #[tokio::test]
    async fn a_manager_hears_that_it_serves_lives_and_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let listener = tokio::net::UnixDatagram::bind(&path).unwrap();
        let manager = manager(path.to_str().unwrap(), Some(Duration::from_millis(2)));
        let mut buffer = [0; 256];
        let mut hear = async || {
            let length = listener.recv(&mut buffer).await.unwrap();
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        };
        manager.ready();
        assert_eq!(hear().await, "READY=1\nSTATUS=Serving");
        // Again and again for as long as it is polled.
        for _ in 0..3 {
            let heard = tokio::select! {
                heard = hear() => heard,
                () = manager.stay_alive() => unreachable!("it goes on"),
            };
            assert_eq!(heard, "WATCHDOG=1");
        }
        manager.stopping();
        // Signs of life may still lie there.
        while !hear().await.starts_with("STOPPING=1\n") {}
    }

    #[test]
    fn a_socket_may_have_an_abstract_name() {
        let name = format!("tern-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let listener = UnixDatagram::bind_addr(&address).unwrap();
        manager(&format!("@{name}"), None).ready();
        assert!(heard(&listener).starts_with("READY=1\n"));
    }

    #[test]
    fn a_watchdog_of_another_process_is_not_ours() {
        let text = |text: &str| Some(text.to_owned());
        let own = text(&std::process::id().to_string());
        let minute = Some(Duration::from_secs(60));
        assert_eq!(patience(text("60000000"), own), minute);
        assert_eq!(patience(text("60000000"), None), minute);
        assert_eq!(patience(text("60000000"), text("1")), None);
        for none in ["0", "soon"] {
            assert_eq!(patience(text(none), None), None);
        }
        assert_eq!(patience(None, None), None);
    }

    #[test]
    fn the_journal_is_known_by_its_stream() {
        use std::os::unix::fs::MetadataExt as _;
        let file = tempfile::tempfile().unwrap();
        let stat = file.metadata().unwrap();
        assert!(is_stream(&format!("{}:{}", stat.dev(), stat.ino()), &file));
        assert!(!is_stream(
            &format!("{}:{}", stat.dev(), stat.ino() + 1),
            &file
        ));
        assert!(!is_stream("", &file));
    }

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_for_the_journal_has_its_priority_and_neither_time_nor_colour() {
        let lines = Lines::default();
        let writer = lines.clone();
        let log = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .event_format(Journal::new())
            .finish();
        tracing::subscriber::with_default(log, || {
            tracing::warn!(target: "tern", reason = 7, "odd");
            tracing::info!(target: "tern", "well");
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text, "<4>tern: odd reason=7\n<6>tern: well\n");
    }
}
