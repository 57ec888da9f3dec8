//! The command line.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum, value_parser};
use url::Url;

/// Most requests at a time, in any mode: each has a connection, and connections are files.
const MAX_SIMULTANEOUS: u64 = 10_000;
const MAX_ROUNDS: u64 = 10_000;
/// Most requests of one load run; each leaves a few bytes in memory.
const MAX_REQUESTS: u64 = 5_000_000;
const MAX_DURATION: Duration = Duration::from_secs(3600);

/// Measure an HTTP server from the outside: how fast sleeping Machines wake, whether storms of
/// requests are all answered, and how latency behaves under load.
///
/// Every run is bounded in requests and in time. The target is known by its URL alone; what has to
/// happen to it between measurements is said by shell commands.
#[derive(Debug, Parser)]
#[command(
    name = "tern-loadtest",
    version,
    after_help = "Exit status: 0 if every request was answered as expected, 1 if any was not or a \
                  command failed, 2 for wrong usage.",
    after_long_help = "EXAMPLES
  How long does the first request to a suspended Machine take?
      tern-loadtest wake --url https://hello.example/ --resolve hello.example:443:127.0.0.1:8443 \\
          --cacert pebble.pem --rounds 30 --suspend-cmd 'tern machine suspend --wait -a hello' \\
          --stop-cmd 'tern machine stop --wait -a hello' --output bench-out

  Are 200 requests at once to a sleeping Machine all answered, twenty times over?
      tern-loadtest storm --url https://hello.example/ --simultaneous 200 --rounds 20 \\
          --between 'tern machine suspend --wait -a hello'

  Latency at 500 requests a second for half a minute:
      tern-loadtest load --url https://hello.example/ --rate 500 --duration 30s

EXIT STATUS
  0  every request was answered as expected
  1  some request was not, or a command failed
  2  wrong usage"
)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The ways to measure.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Measure the first request to a suspended, a running and a stopped Machine.
    ///
    /// Each round suspends the Machine and sends it a request, twice over if there is a --stop-cmd;
    /// sends another one now that it is awake; and, with a --stop-cmd, stops it and sends the last.
    /// So all kinds of request meet the same conditions of the surrounding machine. Every request
    /// has a new connection, made before its time starts.
    Wake(Wake),
    /// Send many requests at the same moment, round after round, and demand that all are answered.
    Storm(Storm),
    /// Send requests for a while, at a constant rate or as fast as some clients can.
    Load(Load),
}

/// What all modes need to know.
#[derive(Debug, Args)]
pub struct Common {
    /// The URL to GET.
    #[arg(long)]
    pub url: Url,

    /// Connect to ADDRESS instead of looking HOST up, as in curl; the certificate must still be
    /// HOST's. ADDRESS may end in a port of its own. May be given several times.
    #[arg(long, value_name = "HOST:PORT:ADDRESS")]
    pub resolve: Vec<Resolve>,

    /// Trust the CA certificates in this PEM file, and no others.
    ///
    /// Without it, the system's are trusted.
    #[arg(long, value_name = "FILE")]
    pub cacert: Option<PathBuf>,

    /// The version of HTTP to speak.
    #[arg(long, value_name = "VERSION", default_value = "1.1")]
    pub http: HttpVersion,

    /// A header to send along, like 'Cookie: a=b'. May be given several times.
    #[arg(long, value_name = "NAME: VALUE")]
    pub header: Vec<Header>,

    /// The status that counts as an answer.
    ///
    /// Without it, any from 200 to 399 does.
    #[arg(long, value_name = "STATUS")]
    pub expect_status: Option<u16>,

    /// Text that every answer's body must contain, in its first 64 KiB.
    #[arg(long, value_name = "TEXT")]
    pub expect_body: Option<String>,

    /// How long a request may take, connecting and reading the whole answer included.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub timeout: Duration,

    /// How long a shell command may take.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    pub command_timeout: Duration,

    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

/// `tern-loadtest wake`.
#[derive(Debug, Args)]
pub struct Wake {
    /// What all modes need to know.
    #[command(flatten)]
    pub common: Common,

    /// How many rounds to measure.
    #[arg(long, default_value = "30", value_parser = value_parser!(u64).range(1..=MAX_ROUNDS))]
    pub rounds: u64,

    /// How many requests meet the suspended or stopped Machine at the same moment.
    #[arg(long, value_name = "N", default_value = "1",
        value_parser = value_parser!(u64).range(1..=MAX_SIMULTANEOUS))]
    pub simultaneous: u64,

    /// A shell command that suspends the Machine and returns when it is suspended.
    #[arg(long, value_name = "COMMAND")]
    pub suspend_cmd: String,

    /// A shell command that stops the Machine and returns when it is stopped.
    ///
    /// It runs once before the first round, too: the first wake after a cold start is told apart
    /// from later ones. Without it, no cold starts are measured, and all wakes count alike.
    #[arg(long, value_name = "COMMAND")]
    pub stop_cmd: Option<String>,

    /// A directory to write wake.md (a table), wake.json (with every sample) and wake.svg (a plot)
    /// to. It is made if need be.
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

/// `tern-loadtest storm`.
#[derive(Debug, Args)]
pub struct Storm {
    /// What all modes need to know.
    #[command(flatten)]
    pub common: Common,

    /// How many requests are sent at the same moment, each on a connection of its own.
    #[arg(long, value_name = "N", default_value = "200",
        value_parser = value_parser!(u64).range(1..=MAX_SIMULTANEOUS))]
    pub simultaneous: u64,

    /// How many times.
    #[arg(long, default_value = "1", value_parser = value_parser!(u64).range(1..=MAX_ROUNDS))]
    pub rounds: u64,

    /// A shell command to run before each round. It finds the round's number, from 1, in
    /// $TERN_LOADTEST_ROUND.
    #[arg(long, value_name = "COMMAND")]
    pub between: Option<String>,

    /// What starts at the same moment: the requests, on connections made before; or the
    /// connections.
    #[arg(long, value_name = "WHAT", default_value = "request")]
    pub barrier: Barrier,
}

/// `tern-loadtest load`.
#[derive(Debug, Args)]
pub struct Load {
    /// What all modes need to know.
    #[command(flatten)]
    pub common: Common,

    /// Requests a second, evenly spaced whether or not earlier ones were answered (an open loop).
    /// Latency counts from when a request should have been sent, so a server that stalls cannot
    /// hide it.
    #[arg(long, value_name = "PER-SECOND", conflicts_with = "clients",
        value_parser = value_parser!(u64).range(1..=100_000))]
    pub rate: Option<u64>,

    /// How many clients send their next request as soon as the last one was answered (a closed
    /// loop).
    #[arg(long, value_name = "N", default_value = "10",
        value_parser = value_parser!(u64).range(1..=MAX_SIMULTANEOUS))]
    pub clients: u64,

    /// How long to send; an hour at most.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = bounded_duration)]
    pub duration: Duration,

    /// Stop after so many requests even if there is time left.
    #[arg(long, value_name = "N", default_value = "1000000",
        value_parser = value_parser!(u64).range(1..=MAX_REQUESTS))]
    pub max_requests: u64,

    /// With --rate: most requests unanswered at a time. Requests beyond are not sent, and count as
    /// failed.
    #[arg(long, value_name = "N", default_value = "1000",
        value_parser = value_parser!(u64).range(1..=MAX_SIMULTANEOUS))]
    pub max_in_flight: u64,

    /// Make a new connection for each request.
    #[arg(long)]
    pub no_keep_alive: bool,
}

/// Versions of HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HttpVersion {
    /// HTTP/1.1.
    #[value(name = "1.1")]
    Http1,
    /// HTTP/2, by ALPN or, without TLS, by prior knowledge.
    #[value(name = "2")]
    Http2,
}

/// What a storm starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Barrier {
    /// Requests, on connections that are ready.
    Request,
    /// Connections.
    Connect,
}

/// An address to use for a host and port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolve {
    /// The host, in lower case.
    pub host: String,
    /// The port in the URL.
    pub port: u16,
    /// Where to connect to.
    pub address: SocketAddr,
}

impl FromStr for Resolve {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (host, rest) = text.split_once(':').ok_or("it must be HOST:PORT:ADDRESS")?;
        let (port, address) = rest.split_once(':').ok_or("it must be HOST:PORT:ADDRESS")?;
        let port = port.parse().map_err(|_| "PORT must be a number")?;
        let bare = address.trim_start_matches('[').trim_end_matches(']');
        let address = match bare.parse::<IpAddr>() {
            Ok(ip) => SocketAddr::new(ip, port),
            Err(_) => address
                .parse()
                .map_err(|_| "ADDRESS must be an IP address, with a port if need be")?,
        };
        Ok(Self {
            host: host.to_ascii_lowercase(),
            port,
            address,
        })
    }
}

/// A request header.
#[derive(Debug, Clone)]
pub struct Header(pub http::HeaderName, pub http::HeaderValue);

impl FromStr for Header {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, value) = text.split_once(':').ok_or("it must be NAME: VALUE")?;
        Ok(Self(
            name.trim()
                .parse()
                .map_err(|_| "that is not a header name")?,
            value
                .trim()
                .parse()
                .map_err(|_| "that is not a header value")?,
        ))
    }
}

/// `500ms`, `30s`, `5m`, `1h`.
fn duration(text: &str) -> Result<Duration, &'static str> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number
        .parse()
        .map_err(|_| "it must be a number with ms, s, m or h")?;
    let seconds = match unit {
        "ms" => number / 1000.0,
        "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => return Err("it must be a number with ms, s, m or h"),
    };
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if !duration.is_zero() && duration <= 24 * MAX_DURATION => Ok(duration),
        _ => Err("it must be more than nothing and at most a day"),
    }
}

fn bounded_duration(text: &str) -> Result<Duration, &'static str> {
    match duration(text)? {
        duration if duration <= MAX_DURATION => Ok(duration),
        _ => Err("it must be an hour at most"),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn resolves_like_curl() {
        let parse = |text: &str| {
            text.parse::<Resolve>()
                .map(|resolve| resolve.address.to_string())
        };
        assert_eq!(parse("a.example:443:127.0.0.1").unwrap(), "127.0.0.1:443");
        assert_eq!(
            parse("a.example:443:127.0.0.1:8443").unwrap(),
            "127.0.0.1:8443"
        );
        assert_eq!(parse("a.example:443:::1").unwrap(), "[::1]:443");
        assert_eq!(parse("a.example:443:[::1]").unwrap(), "[::1]:443");
        assert_eq!(parse("a.example:443:[::1]:8443").unwrap(), "[::1]:8443");
        for bad in [
            "a.example",
            "a.example:443",
            "a.example:x:::1",
            "a.example:443:b.example",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_have_units_and_bounds() {
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for bad in [
            "",
            "5",
            "s",
            "-1s",
            "1.2.3s",
            "0s",
            "25h",
            "1e9s",
            "99999999999999999999h",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert!(bounded_duration("61m").is_err());
    }

    #[test]
    fn counts_are_bounded() {
        let parse = |count: &str| {
            Arguments::try_parse_from(["x", "storm", "--url", "http://a", "--simultaneous", count])
        };
        assert!(parse("200").is_ok());
        assert!(parse("0").is_err() && parse("10001").is_err());
    }
}
