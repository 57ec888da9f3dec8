//! A black-box client: load, wake latency, faults, comparisons

fn main() {}
