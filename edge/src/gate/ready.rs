//! When an app can be spoken to.

use std::net::SocketAddr;
use std::time::Duration;

use futures::future::select_ok;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// First pause after a refused connection. Nothing announces that an app listens, so it is tried: soon at
/// first, for a resumed app listens already and a quick one starts in milliseconds.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// A connection that is not answered in this time is tried anew, rather than waiting for TCP's own second
/// attempt after a second.
const ATTEMPT: Duration = Duration::from_millis(250);

/// Waits until one of the addresses accepts a connection, and tells which; there must be one. The caller
/// sets the limit.
pub async fn accepts(addresses: &[SocketAddr]) -> SocketAddr {
    let mut pause = FIRST_PAUSE;
    loop {
        let attempts = addresses.iter().map(|&address| {
            Box::pin(async move { TcpStream::connect(address).await.map(|_| address) })
        });
        match timeout(ATTEMPT, select_ok(attempts)).await {
            Ok(Ok((address, _others))) => return address,
            Ok(Err(_)) => {}
            // Not refused: the next should be there when its guest runs.
            Err(_) => continue,
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn the_address_at_which_an_app_listens_is_found() {
        let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let v4 = app.local_addr().unwrap();
        let v6 = SocketAddr::new("::1".parse().unwrap(), v4.port());
        assert_eq!(accepts(&[v6, v4]).await, v4);
    }

    #[tokio::test]
    async fn an_app_is_waited_for() {
        let taken = TcpListener::bind("[::1]:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        drop(taken);
        let listen = async {
            // The first attempt is refused by then.
            sleep(FIRST_PAUSE).await;
            TcpListener::bind(address).await.unwrap()
        };
        let addresses = [address];
        let (found, _app) = tokio::join!(accepts(&addresses), listen);
        assert_eq!(found, address);
    }
}
