//! When an app can be spoken to.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// First pause after a refused connection. Nothing announces that an app listens, so it is tried: soon at
/// first, for a resumed app listens already and a quick one starts in milliseconds.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// A connection that is not answered in this time is tried anew, rather than waiting for TCP's own second
/// attempt after a second.
const ATTEMPT: Duration = Duration::from_millis(250);

/// Waits until the address accepts a connection. The caller sets the limit.
pub async fn accepts(address: SocketAddr) {
    let mut pause = FIRST_PAUSE;
    while !matches!(
        timeout(ATTEMPT, TcpStream::connect(address)).await,
        Ok(Ok(_))
    ) {
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
