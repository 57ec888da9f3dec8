//! Connections to apps.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

/// A Machine that runs answers a connection at once.
const CONNECT: Duration = Duration::from_secs(2);
/// First pause after a refused connection. Nothing announces that an app listens, so it is tried: soon at
/// first, for a resumed app listens already and a quick one starts in milliseconds.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// A connection that is not answered in this time is tried anew, rather than waiting for TCP's own second
/// attempt after a second.
const ATTEMPT: Duration = Duration::from_millis(250);
/// A Machine that ends with requests under way says nothing: its kernel is gone, and nobody speaks for its
/// address until it runs again. Probes find that out, or meet the new kernel, which resets them.
const PROBES: socket2::TcpKeepalive = socket2::TcpKeepalive::new()
    .with_time(Duration::from_secs(5))
    .with_interval(Duration::from_secs(1))
    .with_retries(5);

/// Connects to an app that should listen.
pub async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    timeout(CONNECT, dial(address)).await?
}

async fn dial(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_nodelay(true)?;
    socket2::SockRef::from(&socket).set_tcp_keepalive(&PROBES)?;
    socket.connect(address).await
}

/// Whether a connection could not be made for what this host has too little of, which says nothing of the Machine.
pub fn is_shortage(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::EADDRNOTAVAIL)
    )
}

/// Waits until one of the addresses accepts a connection: which, and that connection. There must be one. Each is tried
/// only when those before it refuse: an app that listens at all of them sees one connection. The caller sets the limit.
/// Fails for what this host has too little of.
pub async fn accepts(addresses: &[SocketAddr]) -> io::Result<(SocketAddr, TcpStream)> {
    let (mut pause, mut attempt) = (FIRST_PAUSE, ATTEMPT);
    loop {
        let mut refused = true;
        for &address in addresses {
            match timeout(attempt, dial(address)).await {
                Ok(Ok(stream)) => return Ok((address, stream)),
                Ok(Err(error)) if is_shortage(&error) => return Err(error),
                Ok(Err(_)) => {}
                // Not refused: its guest does not run yet, or is slow.
                Err(_) => {
                    refused = false;
                    attempt = (attempt * 2).min(CONNECT);
                    break;
                }
            }
        }
        if refused {
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
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
        assert_eq!(accepts(&[v6, v4]).await.unwrap().0, v4);
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
        assert_eq!(found.unwrap().0, address);
    }
}
