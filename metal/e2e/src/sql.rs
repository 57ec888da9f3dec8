//! A client of PostgreSQL: simple queries in protocol 3.0 (PostgreSQL's manual, chapter 55), enough to
//! know what one connection was told.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use anyhow::{Context as _, Result, bail, ensure};

/// A session of user `postgres` in the database `postgres`.
#[derive(Debug)]
pub struct Session {
    stream: TcpStream,
}

/// A message: its type, and what it says.
type Message = (u8, Vec<u8>);

impl Session {
    /// Begins one where the server trusts whoever reaches it.
    pub fn begin(stream: TcpStream) -> Result<Self> {
        const PROTOCOL_3_0: u32 = 3 << 16;
        let mut body = PROTOCOL_3_0.to_be_bytes().to_vec();
        body.extend(b"user\0postgres\0database\0postgres\0\0");
        let mut session = Self { stream };
        session.send(&[], &body)?;
        session.until_ready()?;
        Ok(session)
    }

    /// Runs one statement: the first column of each row, as text. Once this has returned, what the
    /// statement did is committed.
    pub fn query(&mut self, sql: &str) -> Result<Vec<String>> {
        self.send(b"Q", &[sql.as_bytes(), b"\0"].concat())?;
        let rows = self.until_ready().with_context(|| sql.to_owned())?;
        rows.iter().map(|row| first_column(row)).collect()
    }

    /// The only row of a statement.
    pub fn one(&mut self, sql: &str) -> Result<String> {
        let rows = self.query(sql)?;
        ensure!(rows.len() == 1, "{sql}: {rows:?}");
        rows.into_iter().next().context("no row")
    }

    fn send(&mut self, kind: &[u8], body: &[u8]) -> Result<()> {
        let length = u32::try_from(body.len() + 4)?;
        let message = [kind, &length.to_be_bytes(), body].concat();
        Ok(self.stream.write_all(&message)?)
    }

    /// The `DataRow`s up to the next `ReadyForQuery`.
    fn until_ready(&mut self) -> Result<Vec<Vec<u8>>> {
        let mut rows = Vec::new();
        let mut refused = None;
        loop {
            match self.receive()? {
                (b'Z', _) => return refused.map_or(Ok(rows), Err),
                (b'D', row) => rows.push(row),
                (b'E', error) => {
                    let text = String::from_utf8_lossy(&error).replace('\0', " ");
                    // A session that cannot begin, or is ended, gets no `ReadyForQuery`.
                    if text.starts_with("SFATAL") || text.starts_with("SPANIC") {
                        bail!(text);
                    }
                    refused = Some(anyhow::anyhow!(text));
                }
                (b'R', kind) => ensure!(kind == [0; 4], "it wants a password: {kind:?}"),
                _ => {}
            }
        }
    }

    fn receive(&mut self) -> Result<Message> {
        const LONGEST: usize = 1 << 20;
        let mut head = [0; 5];
        self.stream.read_exact(&mut head)?;
        let [kind, length @ ..] = head;
        let length = usize::try_from(u32::from_be_bytes(length))?;
        ensure!(
            (4..LONGEST).contains(&length),
            "a message of {length} bytes"
        );
        let mut body = vec![0; length - 4];
        self.stream.read_exact(&mut body)?;
        Ok((kind, body))
    }
}

/// Number of columns (2 bytes), then each with its length (4) and its text; NULL has length -1.
fn first_column(row: &[u8]) -> Result<String> {
    let (length, text) = row
        .get(2..)
        .and_then(<[u8]>::split_first_chunk)
        .context("a row without a column")?;
    let Ok(length) = usize::try_from(i32::from_be_bytes(*length)) else {
        return Ok("NULL".to_owned());
    };
    let text = text.get(..length).context("a column that is cut off")?;
    Ok(String::from_utf8_lossy(text).into_owned())
}
