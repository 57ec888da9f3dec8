//! The one binary a person runs

fn main() {}
