//! `tern logs`.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use http::Method;
use http_body_util::BodyExt as _;

use super::app_of;
use super::wire::LogLine;
use crate::args::Logs;
use crate::client::{Client, empty};

/// A line of the stream longer than this is not the API's.
const MAX_LINE_BYTES: usize = 1 << 20;

pub async fn run(client: &Client, args: &Logs) -> Result<ExitCode> {
    let app = app_of(&args.app)?;
    let machine = args
        .machine
        .as_ref()
        .map(|m| format!("&machine={m}"))
        .unwrap_or_default();
    let path = format!("/v1/apps/{app}/logs?follow={}{machine}", args.follow);
    let answer = client
        .call(client.request(Method::GET, &path).body(empty())?)
        .await?;
    let mut body = answer.into_body();
    let mut pending = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame
            .context("the stream of log lines broke off")?
            .into_data()
        else {
            continue;
        };
        pending.extend_from_slice(&data);
        while let Some(end) = pending.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            if print(&line, args.app.json).is_err() {
                // Whoever read our output has gone (`| head`): that is no error.
                return Ok(ExitCode::SUCCESS);
            }
        }
        if pending.len() > MAX_LINE_BYTES {
            bail!("the server sent a line without an end");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print(raw: &[u8], json: bool) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if raw.iter().all(u8::is_ascii_whitespace) {
        return Ok(());
    }
    match serde_json::from_slice::<LogLine>(raw) {
        Ok(line) if !json => {
            let time = jiff::Timestamp::from_millisecond(line.unix_ms).unwrap_or_default();
            // An app's output must not drive the reader's terminal.
            let text: String = line
                .line
                .chars()
                .map(|c| {
                    if c.is_control() && c != '\t' {
                        '\u{fffd}'
                    } else {
                        c
                    }
                })
                .collect();
            writeln!(out, "{time:.3} {} {text}", line.machine)
        }
        _ => out.write_all(raw),
    }
}
