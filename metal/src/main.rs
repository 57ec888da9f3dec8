//! A virtual bare-metal host with true KVM

fn main() {}
