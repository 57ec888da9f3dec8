//! A monitor that runs, and what its guest has told.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use parking_lot::Mutex;
use tern_guest::message::{Event, ExitStatus};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::guest::{Attached, Guest, GuestError};
use crate::logs::Logs;
use crate::machine::core::Epoch;
use crate::monitor::Monitor;

/// A monitor that runs, and what its guest has told.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) epoch: Epoch,
    pub(crate) monitor: Monitor,
    /// Its snapshot is being written, or is good: nobody removes it when the monitor ends.
    pub(crate) sleeps: AtomicBool,
    news: watch::Sender<News>,
    collector: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct News {
    started: bool,
    exited: Option<ExitStatus>,
    /// Nothing more will be told.
    over: bool,
}

impl Running {
    pub(crate) fn new(epoch: Epoch, monitor: Monitor) -> Arc<Self> {
        Arc::new(Self {
            epoch,
            monitor,
            sleeps: AtomicBool::new(false),
            news: watch::channel(News::default()).0,
            collector: Mutex::default(),
        })
    }

    /// Collects what the guest tells, until the monitor ends or the app has. `boot` numbers the
    /// guest's cold start.
    pub(crate) fn attend(self: &Arc<Self>, guest: Guest, logs: Arc<Logs>, boot: u64) {
        let running = Arc::clone(self);
        let collector = tokio::spawn(async move {
            running.collect(&guest, &logs, boot).await;
            running.news.send_modify(|news| news.over = true);
        });
        *self.collector.lock() = Some(collector);
    }

    /// Stops to collect: the agent ends.
    pub(crate) fn leave(&self) {
        if let Some(collector) = self.collector.lock().take() {
            collector.abort();
        }
    }

    /// Waits for the app: that it runs, or how it ended instead.
    pub(crate) async fn app_started(&self) -> Result<(), ExitStatus> {
        let mut news = self.news.subscribe();
        match news
            .wait_for(|n| n.started || n.exited.is_some())
            .await
            .map(|n| *n)
        {
            // One that has started and ended at once has started.
            Ok(News { started: true, .. }) => Ok(()),
            Ok(News {
                exited: Some(exit), ..
            }) => Err(exit),
            _ => std::future::pending().await,
        }
    }

    /// Waits for the app's end.
    pub(crate) async fn app_exited(&self) -> ExitStatus {
        let mut news = self.news.subscribe();
        match news
            .wait_for(|n| n.exited.is_some())
            .await
            .map(|n| n.exited)
        {
            Ok(Some(exit)) => exit,
            _ => std::future::pending().await,
        }
    }

    /// How the app ended, if that has been told.
    pub(crate) fn exited(&self) -> Option<ExitStatus> {
        self.news.borrow().exited
    }

    /// After the monitor's end: waits until all that it had passed on has been read.
    pub(crate) async fn news_settled(&self) {
        if self.collector.lock().is_none() {
            return;
        }
        let mut news = self.news.subscribe();
        let settled = news.wait_for(|n| n.over);
        let _ = tokio::time::timeout(LAST_WORDS, settled).await;
    }

    async fn collect(&self, guest: &Guest, logs: &Logs, boot: u64) {
        let mut pause = FIRST_PAUSE;
        while !self.monitor.has_ended() {
            let mut heard = false;
            let outcome = match guest.attach(logs.wanted_from(boot)).await {
                Ok(attached) => self.read(attached, logs, boot, &mut heard).await,
                Err(error) => Err(error),
            };
            // A guest that accepts and says nothing is asked less and less often, as one that is not there.
            if heard {
                pause = FIRST_PAUSE;
            }
            match outcome {
                Ok(true) => return,
                // It broke off: an init that restarts its connections, or the monitor's end.
                Ok(false) => {}
                Err(error) => tracing::trace!(%error, "not attached"),
            }
            tokio::select! {
                _ = self.monitor.ended() => {}
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Returns whether everything has been told, and tells on the way that something has.
    async fn read(
        &self,
        mut attached: Attached,
        logs: &Logs,
        boot: u64,
        heard: &mut bool,
    ) -> Result<bool, GuestError> {
        while let Some(event) = attached.next().await? {
            *heard = true;
            match event {
                Event::Log {
                    seq,
                    stream,
                    unix_ms,
                    line,
                } => logs.push(boot, seq, stream, unix_ms, line),
                Event::Started { .. } => self.news.send_modify(|news| news.started = true),
                Event::Exited(exit) => {
                    self.news.send_modify(|news| news.exited = Some(exit));
                    // Closing tells init that the news has arrived.
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

/// Between two attempts to attach to a guest that boots.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// What a dead monitor has left in its sockets is read in no time.
const LAST_WORDS: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::monitor::Start;

    #[tokio::test]
    async fn a_guest_that_accepts_and_says_nothing_is_asked_less_often() {
        let dir = tempfile::tempdir().unwrap();
        let binary = dir.path().join("vmm");
        std::fs::write(&binary, "#!/bin/sh\nexec sleep 1000\n").unwrap();
        std::fs::set_permissions(&binary, PermissionsExt::from_mode(0o755)).unwrap();
        let monitor = Monitor::spawn(Start {
            binary: &binary,
            config: Path::new("/c"),
            log: &dir.path().join("log"),
            restore: false,
            own_pids: false,
        });
        let running = Running::new(Epoch::default(), monitor.unwrap());
        let socket = dir.path().join("vsock.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let logs = Arc::new(Logs::new(dir.path().join("console.log"), Arc::default()));
        running.attend(Guest::new(&socket), logs, 1);
        let began = std::time::Instant::now();
        for _ in 0..9 {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut hello = [0; "CONNECT 10000\n".len()];
            stream.read_exact(&mut hello).await.unwrap();
            stream.write_all(b"OK 1073741824\n").await.unwrap();
            // What is asked.
            assert_ne!(stream.read(&mut [0; 64]).await.unwrap(), 0);
        }
        // 5, 10, 20, 40, 80 and three times 100 ms lie between them.
        assert!(
            began.elapsed() >= Duration::from_millis(455),
            "{:?}",
            began.elapsed()
        );
        running.leave();
        running.monitor.kill();
        running.monitor.ended().await;
    }
}
