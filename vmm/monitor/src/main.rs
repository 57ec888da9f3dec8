//! The KVM monitor of one Tern Machine

fn main() {}
