//! The one answer the CA's resolver gets: every name is 127.0.0.1 (RFC 1035 section 4).

use std::net::SocketAddr;

use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

/// Answers while it lives.
pub struct Dns {
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl Dns {
    pub async fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut query = [0; 1500];
            loop {
                let (len, from) = socket.recv_from(&mut query).await.unwrap();
                if let Some(reply) = reply(&query[..len]) {
                    socket.send_to(&reply, from).await.unwrap();
                }
            }
        });
        Self { address, task }
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.task.abort();
    }
}

const HEADER: usize = 12;
const A: u16 = 1;

/// 127.0.0.1 to a question for an address, "no such record" to any other.
fn reply(query: &[u8]) -> Option<Vec<u8>> {
    let mut end = HEADER;
    loop {
        match *query.get(end)? {
            0 => break,
            label => end += 1 + usize::from(label),
        }
    }
    let question = query.get(HEADER..end + 5)?;
    let kind = u16::from_be_bytes([query[end + 1], query[end + 2]]);
    let answers = u8::from(kind == A);
    let mut reply = query[..2].to_vec();
    // A response, recursion desired and available; one question.
    reply.extend([0x81, 0x80, 0, 1, 0, answers, 0, 0, 0, 0]);
    reply.extend(question);
    if kind == A {
        // The name is the question's; class IN, a minute, four bytes.
        reply.extend([0xc0, HEADER as u8, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        reply.extend([127, 0, 0, 1]);
    }
    Some(reply)
}
