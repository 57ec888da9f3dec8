//! PID 1 of a Tern Machine

fn main() {}
