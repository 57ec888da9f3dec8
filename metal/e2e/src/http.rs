//! Requests, made by `curl`: a client that nobody here wrote.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::process::output;

/// What came back.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The status.
    pub status: u16,
    /// `1.1` or `2`.
    pub version: String,
    /// Headers by lowercase name; the last of several.
    pub headers: BTreeMap<String, String>,
    /// The body.
    pub body: String,
}

impl Reply {
    /// Sends a request by `curl` with these arguments.
    pub fn of(curl: &mut Command) -> Result<Self> {
        curl.args(["-sS", "-i", "-w", "\n%{http_version} %{http_code}"]);
        let answer = output(curl)?;
        if !answer.status.success() {
            bail!(
                "curl: {} ({})",
                String::from_utf8_lossy(&answer.stderr).trim(),
                answer.status
            );
        }
        Self::parse(&String::from_utf8_lossy(&answer.stdout))
    }

    /// The body as JSON.
    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_str(&self.body).with_context(|| format!("not JSON: {self:?}"))
    }

    fn parse(text: &str) -> Result<Self> {
        let (rest, last) = text.rsplit_once('\n').context("curl printed nothing")?;
        let (version, status) = last.split_once(' ').context("curl printed no status")?;
        let (head, body) = rest
            .split_once("\r\n\r\n")
            .context("curl printed no headers")?;
        let header = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.trim().to_lowercase(), value.trim().to_owned()))
        };
        Ok(Self {
            status: status.trim().parse().context("curl printed no status")?,
            version: version.to_owned(),
            headers: head.lines().skip(1).filter_map(header).collect(),
            body: body.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_curl_prints() {
        let reply =
            Reply::parse("HTTP/2 200 \r\nvia: 2 tern\r\nX-A: b\r\n\r\nhello\n\n2 200").unwrap();
        assert_eq!((reply.status, reply.version.as_str()), (200, "2"));
        assert_eq!(
            (reply.headers["via"].as_str(), reply.headers["x-a"].as_str()),
            ("2 tern", "b")
        );
        assert_eq!(reply.body, "hello\n");
    }
}
