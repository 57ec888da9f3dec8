//! `tern`: the one binary a person runs.
//!
//! User commands speak to the API; `tern serve` puts the roles of a server together, and `tern host` looks after
//! its disks. `tern doctor` looks at the server itself.

mod appconfig;
mod args;
mod catalog;
mod client;
mod commands;
mod config;
mod describe;
mod doctor;
mod host;
mod image;
mod output;
mod serve;
mod settings;
#[cfg(test)]
mod testing;

use std::process::ExitCode;

fn main() -> ExitCode {
    let args = match config::parse(std::env::args_os().collect()) {
        Ok(args) => args,
        Err(refused) => return refused.tell(),
    };
    let outcome = match args.command {
        args::Command::Serve(serve) => serve::run(*serve),
        args::Command::Doctor(doctor) => doctor::run(&doctor),
        args::Command::Host(host) => host::run(host),
        args::Command::Catalog(catalog) => catalog::run(catalog),
        args::Command::Completion { shell } => describe::completion(shell),
        args::Command::ManPages { directory } => describe::man_pages(&directory),
        command => commands::run(command, &args.global),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("Error: {}", output::chain(&error));
            ExitCode::FAILURE
        }
    }
}
