//! Services that are not HTTP, on ports of their own and on shared ones.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tern_catalog::Machine;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::app::{App, Temper};
use crate::client::{Client, PATIENCE, secure};
use crate::world::{HOST, Options, World, piped};

/// An app that speaks first, says back what it hears, and at the end of that, or at `QUIT`, says `bye` and closes.
struct Echo {
    port: u16,
    heard: Arc<Mutex<Vec<Vec<u8>>>>,
    _server: JoinSet<()>,
}

const BANNER: &[u8] = b"220 ready\r\n";
const BYE: &[u8] = b"bye";
const QUIT: &[u8] = b"QUIT\n";

impl Echo {
    async fn new() -> Self {
        let listener = TcpListener::bind("[::1]:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&heard);
        let mut server = JoinSet::new();
        server.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(echo(stream, Arc::clone(&all)));
            }
        });
        Self {
            port,
            heard,
            _server: server,
        }
    }

    /// What its only connection has brought.
    fn heard(&self) -> Vec<u8> {
        let heard = self.heard.lock();
        assert_eq!(heard.len(), 1, "{heard:?}");
        heard[0].clone()
    }
}

async fn echo(mut stream: TcpStream, all: Arc<Mutex<Vec<Vec<u8>>>>) {
    let own = {
        let mut all = all.lock();
        all.push(Vec::new());
        all.len() - 1
    };
    let mut buffer = vec![0; 16 << 10];
    // Whoever goes away is not spoken to any more.
    let _: io::Result<()> = async {
        stream.write_all(BANNER).await?;
        loop {
            let read = stream.read(&mut buffer).await?;
            if read == 0 || buffer[..read].ends_with(QUIT) {
                return stream.write_all(BYE).await;
            }
            all.lock()[own].extend_from_slice(&buffer[..read]);
            stream.write_all(&buffer[..read]).await?;
        }
    }
    .await;
}

/// Free ports in a row, below those that the kernel gives to whoever asks for any.
fn free_ports(count: u16) -> u16 {
    for _ in 0..1000 {
        let first = 10_000 + rand::random::<u16>() % 20_000;
        let bind = |port| std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port));
        if (first..first + count).all(|port| bind(port).is_ok()) {
            return first;
        }
    }
    panic!("no free port in 1000 tries");
}

fn at(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

async fn world(services: &str) -> World {
    let app = App::new(Temper::Strict).await;
    let options = Options {
        services,
        ..Options::default()
    };
    World::with(app.port, options).await
}

/// One service on one port.
fn service(app: u16, port: u16, handlers: &str, more: &str) -> String {
    format!(
        r#"{{"internal_port": {app}, "ports": [{{"port": {port}, "handlers": [{handlers}] {more}}}]}},"#
    )
}

async fn reads<S: AsyncRead + Unpin>(stream: &mut S, wanted: &[u8]) {
    let mut read = vec![0; wanted.len()];
    let outcome = timeout(PATIENCE, stream.read_exact(&mut read)).await;
    outcome.expect("in time").unwrap();
    assert!(read == wanted, "{}", String::from_utf8_lossy(&read));
}

/// The app speaks first; all comes back, also much at once; a client that has said all is still answered.
async fn is_relayed<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    reads(&mut stream, BANNER).await;
    stream.write_all(b"HELO\r\n").await.unwrap();
    reads(&mut stream, b"HELO\r\n").await;
    let large: Vec<u8> = (0..2_000_000_u32)
        .map(|n| n as u8 ^ (n >> 8) as u8)
        .collect();
    let (mut read, mut write) = tokio::io::split(stream);
    tokio::join!(
        async {
            write.write_all(&large).await.unwrap();
            write.shutdown().await.unwrap();
        },
        async {
            reads(&mut read, &large).await;
            reads(&mut read, BYE).await;
            let mut rest = Vec::new();
            let end = timeout(PATIENCE, read.read_to_end(&mut rest)).await;
            assert!(end.expect("in time").is_ok() && rest.is_empty());
        }
    );
}

#[tokio::test]
async fn raw_tcp_and_ranges_of_ports() {
    let (echo, port) = (Echo::new().await, free_ports(3));
    let (app, last) = (echo.port, port + 2);
    let services = format!(
        r#"{{"internal_port": {app}, "ports": [{{"start_port": {port}, "end_port": {last}}}]}},"#
    );
    let _world = world(&services).await;
    for port in port..=last {
        is_relayed(TcpStream::connect(at(port)).await.unwrap()).await;
    }
}

#[tokio::test]
async fn tls_ends_at_the_edge_and_agrees_on_no_protocol_of_http() {
    let (echo, port) = (Echo::new().await, free_ports(1));
    let world = world(&service(echo.port, port, r#""tls""#, "")).await;
    let connect = || async { TcpStream::connect(at(port)).await.unwrap() };
    let stream = secure(&world, connect().await, &[b"h2", b"http/1.1"]).await;
    let stream = stream.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), None);
    is_relayed(stream).await;
    // Plain text is answered in TLS's own words, and never reaches the app.
    let mut plain = connect().await;
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(PATIENCE, plain.read_to_end(&mut answer))
        .await
        .unwrap();
    assert_eq!(answer.first(), Some(&21), "{answer:?}");
    assert_eq!(echo.heard.lock().len(), 1);
}

#[tokio::test]
async fn tls_options_are_kept() {
    let (echo, port) = (Echo::new().await, free_ports(2));
    let options = r#", "tls_options": {"alpn": ["imap"], "versions": ["TLSv1.2"]}"#;
    let tls = service(echo.port, port, r#""tls""#, options);
    let only_1 = r#", "tls_options": {"alpn": ["http/1.1"], "versions": ["TLSv1.3"]}"#;
    let https = service(echo.port, port + 1, r#""tls", "http""#, only_1);
    let world = world(&(tls + &https)).await;
    let connect = |port| async move { TcpStream::connect(at(port)).await.unwrap() };
    let stream = secure(&world, connect(port).await, &[b"imap"])
        .await
        .unwrap();
    let session = stream.get_ref().1;
    assert_eq!(session.alpn_protocol(), Some(&b"imap"[..]));
    assert_eq!(
        session.protocol_version(),
        Some(rustls::ProtocolVersion::TLSv1_2)
    );
    is_relayed(stream).await;
    assert!(secure(&world, connect(port).await, &[b"h2"]).await.is_err());
    let offered: [&[u8]; 2] = [b"h2", b"http/1.1"];
    let stream = secure(&world, connect(port + 1).await, &offered).await;
    let stream = stream.unwrap();
    let session = stream.get_ref().1;
    assert_eq!(session.alpn_protocol(), Some(&b"http/1.1"[..]));
    assert_eq!(
        session.protocol_version(),
        Some(rustls::ProtocolVersion::TLSv1_3)
    );
}

#[tokio::test]
async fn postgres_asks_for_tls_in_its_own_way() {
    let (echo, port) = (Echo::new().await, free_ports(1));
    let world = world(&service(echo.port, port, r#""pg_tls""#, "")).await;
    // As libpq does: GSSAPI first, if it could.
    let mut stream = TcpStream::connect(at(port)).await.unwrap();
    stream
        .write_all(&[0, 0, 0, 8, 4, 0xd2, 0x16, 0x30])
        .await
        .unwrap();
    reads(&mut stream, b"N").await;
    stream
        .write_all(&[0, 0, 0, 8, 4, 0xd2, 0x16, 0x2f])
        .await
        .unwrap();
    reads(&mut stream, b"S").await;
    is_relayed(secure(&world, stream, &[]).await.unwrap()).await;
    // From version 17 on TLS may begin at once.
    let stream = TcpStream::connect(at(port)).await.unwrap();
    is_relayed(secure(&world, stream, &[b"postgresql"]).await.unwrap()).await;
    // Who wants none is told why it gets nothing: StartupMessage, and an ErrorResponse.
    let mut stream = TcpStream::connect(at(port)).await.unwrap();
    stream
        .write_all(&[0, 0, 0, 9, 0, 3, 0, 0, 0])
        .await
        .unwrap();
    let mut answer = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
    assert_eq!(answer.first(), Some(&b'E'));
    assert!(String::from_utf8_lossy(&answer).contains("sslmode=require"));
    assert_eq!(echo.heard.lock().len(), 2);
    // A client that nobody here wrote.
    let mut openssl = tokio::process::Command::new("openssl");
    openssl
        .args(["s_client", "-starttls", "postgres", "-verify_return_error"])
        .args(["-servername", HOST, "-connect", &at(port).to_string()])
        .args(["-quiet", "-CAfile"])
        .arg(world.ca());
    let output = timeout(PATIENCE, piped(openssl, QUIT)).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(text, "220 ready\r\nbye", "{errors}");
}

#[tokio::test]
async fn an_app_is_told_who_connected() {
    let (echo, port) = (Echo::new().await, free_ports(1));
    let _world = world(&service(echo.port, port, r#""proxy_proto""#, "")).await;
    let mut stream = TcpStream::connect(at(port)).await.unwrap();
    let own = stream.local_addr().unwrap().port();
    let line = format!("PROXY TCP4 127.0.0.1 127.0.0.1 {own} {port}\r\n");
    reads(&mut stream, BANNER).await;
    stream.write_all(b"hello").await.unwrap();
    reads(&mut stream, format!("{line}hello").as_bytes()).await;
    assert_eq!(echo.heard(), format!("{line}hello").as_bytes());
}

#[tokio::test]
async fn an_app_behind_tls_is_told_in_binary() {
    let (echo, port) = (Echo::new().await, free_ports(1));
    let version = r#", "proxy_proto_options": {"version": "v2"}"#;
    let world = world(&service(
        echo.port,
        port,
        r#""tls", "proxy_proto""#,
        version,
    ))
    .await;
    let stream = TcpStream::connect(at(port)).await.unwrap();
    let own = stream.local_addr().unwrap().port();
    let mut stream = secure(&world, stream, &[]).await.unwrap();
    stream.write_all(b"x").await.unwrap();
    let mut told = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01".to_vec();
    told.extend(own.to_be_bytes());
    told.extend(port.to_be_bytes());
    told.push(b'x');
    reads(&mut stream, &[BANNER, &told].concat()).await;
}

#[tokio::test]
async fn one_port_is_shared_by_whoever_names_an_app() {
    let (echo, port) = (Echo::new().await, free_ports(1));
    let web = App::new(Temper::Strict).await;
    let services = service(echo.port, port, r#""tls""#, "")
        + &service(web.port, port, r#""http""#, "")
        + &service(echo.port, port, r#""pg_tls""#, "");
    let world = world(&services).await;
    let connect = || async { TcpStream::connect(at(port)).await.unwrap() };
    is_relayed(secure(&world, connect().await, &[]).await.unwrap()).await;
    let mut client = Client::new(connect().await);
    client.get("/", "one", "").await;
    client.answer().await.is_for("one");
    let [got] = &web.requests()[..] else {
        panic!("one request");
    };
    assert_eq!(got.one("x-forwarded-port"), Some(&*port.to_string()));
}

#[tokio::test]
async fn ports_open_and_close_with_the_catalog() {
    let (echo, port) = (Echo::new().await, free_ports(2));
    let world = world(&service(echo.port, port, "", "")).await;
    let mut open = TcpStream::connect(at(port)).await.unwrap();
    reads(&mut open, BANNER).await;
    world
        .reconfigure(|machine| machine.config.services[0].ports[0].port = Some(port + 1))
        .await;
    let moved = async {
        loop {
            match TcpStream::connect(at(port + 1)).await {
                Ok(stream) => return stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    };
    let moved = timeout(PATIENCE, moved).await.expect("the new port opens");
    is_relayed(moved).await;
    let closed = async {
        while TcpStream::connect(at(port)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, closed)
        .await
        .expect("the old port closes");
    // Who is connected stays so.
    open.write_all(b"still here").await.unwrap();
    reads(&mut open, b"still here").await;
}

#[tokio::test]
async fn a_connection_wakes_its_machine_and_loses_nothing() {
    let (echo, port) = (Echo::new().await, free_ports(1));
    let app = App::new(Temper::Strict).await;
    let options = Options {
        services: &service(echo.port, port, "", ""),
        asleep: true,
        ..Options::default()
    };
    let world = World::with(app.port, options).await;
    let mut stays = TcpStream::connect(at(port)).await.unwrap();
    stays.write_all(b"early").await.unwrap();
    world.until_starting().await;
    // One that goes away meanwhile never reaches the app.
    let mut gone = TcpStream::connect(at(port)).await.unwrap();
    gone.write_all(b"ghost").await.unwrap();
    let _ = socket2::SockRef::from(&gone).set_linger(Some(Duration::ZERO));
    drop(gone);
    world.wake();
    reads(&mut stays, &[BANNER, b"early"].concat()).await;
    // The gate's own look at whether the app accepts was the client's connection.
    assert_eq!(*echo.heard.lock(), [b"early"]);
}

#[tokio::test]
async fn an_app_that_hears_no_more_has_ended_and_is_not_broken() {
    let listener = TcpListener::bind("[::1]:0").await.unwrap();
    let app = listener.local_addr().unwrap().port();
    let port = free_ports(1);
    let _world = world(&service(app, port, "", "")).await;
    let mut client = TcpStream::connect(at(port)).await.unwrap();
    let (mut at_app, _) = listener.accept().await.unwrap();
    at_app.write_all(b"last words").await.unwrap();
    // By then its kernel has nothing left to send, and a reset takes nothing of it back.
    reads(&mut client, b"last ").await;
    drop(at_app);
    // What is said meets a closed door: the app's kernel answers with a reset, and the next write to it fails.
    for _ in 0..10 {
        client.write_all(b"QUIT\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut heard = Vec::new();
    let end = timeout(PATIENCE, client.read_to_end(&mut heard)).await;
    assert!(end.expect("in time").is_ok());
    assert_eq!(heard, b"words");
}

#[tokio::test]
async fn a_broken_connection_is_no_end_of_what_was_said() {
    let listener = TcpListener::bind("[::1]:0").await.unwrap();
    let app = listener.local_addr().unwrap().port();
    let port = free_ports(1);
    let _world = world(&service(app, port, "", "")).await;
    // The app's end, as a crash breaks it.
    let mut client = TcpStream::connect(at(port)).await.unwrap();
    let (mut at_app, _) = listener.accept().await.unwrap();
    client.write_all(b"x").await.unwrap();
    reads(&mut at_app, b"x").await;
    let _ = socket2::SockRef::from(&at_app).set_linger(Some(Duration::ZERO));
    drop(at_app);
    let mut rest = Vec::new();
    let end = timeout(PATIENCE, client.read_to_end(&mut rest)).await;
    let error = end.expect("in time").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    // The client's.
    let mut client = TcpStream::connect(at(port)).await.unwrap();
    let (mut at_app, _) = listener.accept().await.unwrap();
    client.write_all(b"x").await.unwrap();
    reads(&mut at_app, b"x").await;
    let _ = socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO));
    drop(client);
    let end = timeout(PATIENCE, at_app.read_to_end(&mut rest)).await;
    let error = end.expect("in time").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_port_is_its_first_claimants_and_no_other_apps() {
    let (echo, port) = (Echo::new().await, free_ports(1));
    let theirs = Echo::new().await;
    let world = world(&service(echo.port, port, "", "")).await;
    let seen = free_ports(1);
    world
        .add(|machine| {
            machine.app = "other".parse().unwrap();
            machine.created_at = jiff::Timestamp::now();
            machine.config.services[0].internal_port = theirs.port;
            // By this it is known that the edge has seen it.
            let second = tern_catalog::Port::new(seen, Vec::new());
            machine.config.services[0].ports.push(second);
        })
        .await;
    let known = async {
        while TcpStream::connect(at(seen)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, known).await.expect("it is seen");
    let mut stream = TcpStream::connect(at(port)).await.unwrap();
    reads(&mut stream, BANNER).await;
    assert_eq!(echo.heard.lock().len(), 1);
}

/// An app that says back each datagram with its sender's port before it.
async fn udp_echo(address: &str) -> (u16, JoinSet<()>) {
    let socket = UdpSocket::bind(address).await.unwrap();
    let port = socket.local_addr().unwrap().port();
    let mut server = JoinSet::new();
    server.spawn(async move {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
            let mut answer = from.port().to_be_bytes().to_vec();
            answer.extend_from_slice(&buffer[..length]);
            socket.send_to(&answer, from).await.unwrap();
        }
    });
    (port, server)
}

fn udp_service(app: u16, port: u16) -> String {
    format!(r#"{{"protocol": "udp", "internal_port": {app}, "ports": [{{"port": {port}}}]}},"#)
}

async fn udp_client(port: u16) -> UdpSocket {
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(at(port)).await.unwrap();
    client
}

/// Sends a datagram and reads what comes back: by which of the edge's ports it reached the app.
async fn said_back(client: &UdpSocket, datagram: &[u8]) -> u16 {
    client.send(datagram).await.unwrap();
    let mut buffer = vec![0; 64 << 10];
    let answer = timeout(PATIENCE, client.recv(&mut buffer)).await;
    let length = answer.expect("in time").unwrap();
    assert_eq!(&buffer[2..length], datagram);
    u16::from_be_bytes([buffer[0], buffer[1]])
}

#[tokio::test]
async fn datagrams_of_one_client_are_one_session() {
    let (app, _server) = udp_echo("127.0.0.1:0").await;
    let port = free_ports(1);
    let _world = world(&udp_service(app, port)).await;
    let (one, two) = (udp_client(port).await, udp_client(port).await);
    let first = said_back(&one, b"hello").await;
    // Longer than a frame, and nothing at all, are datagrams too.
    assert_eq!(said_back(&one, &[7; 9000]).await, first);
    assert_eq!(said_back(&one, b"").await, first);
    let other = said_back(&two, b"hello").await;
    assert_ne!(other, first);
    assert_eq!(said_back(&one, b"again").await, first);
}

#[tokio::test]
async fn a_session_goes_where_its_port_leads_now() {
    let (app, _server) = udp_echo("127.0.0.1:0").await;
    let port = free_ports(1);
    let world = world(&udp_service(app, port)).await;
    let client = udp_client(port).await;
    said_back(&client, b"hello").await;
    let other = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let internal = other.local_addr().unwrap().port();
    let change = |machine: &mut Machine| machine.config.services[0].internal_port = internal;
    world.reconfigure(change).await;
    // However often it is used, the old session ends.
    let arrives = async {
        let mut buffer = [0; 16];
        loop {
            client.send(b"again").await.unwrap();
            let come = other.recv(&mut buffer);
            if let Ok(length) = timeout(Duration::from_millis(50), come).await {
                return buffer[..length.unwrap()].to_vec();
            }
        }
    };
    let arrived = timeout(PATIENCE, arrives).await.expect("in time");
    assert_eq!(arrived, b"again");
}

#[tokio::test]
async fn an_app_that_listens_by_ipv6_alone_gets_the_first_datagram_too() {
    let (app, _server) = udp_echo("[::1]:0").await;
    let port = free_ports(1);
    let _world = world(&udp_service(app, port)).await;
    let client = udp_client(port).await;
    let first = said_back(&client, b"hello").await;
    assert_eq!(said_back(&client, b"again").await, first);
}

#[tokio::test]
async fn a_datagram_wakes_its_machine() {
    let (app, _server) = udp_echo("127.0.0.1:0").await;
    let port = free_ports(1);
    let web = App::new(Temper::Strict).await;
    let options = Options {
        services: &udp_service(app, port),
        asleep: true,
        ..Options::default()
    };
    let world = World::with(web.port, options).await;
    let client = udp_client(port).await;
    let waits = said_back(&client, b"hello");
    let wakes = async {
        world.until_starting().await;
        world.wake();
    };
    tokio::join!(waits, wakes);
}
