//! Real guests under true KVM: start, devices, end, suspend and resume.
//!
//! Run by `make test` inside metal; elsewhere each fails and says so.

#![allow(clippy::unwrap_used)] // helpers of tests are not in `#[test]` functions

mod devices;
mod life;
#[path = "../support/mod.rs"]
mod support;
mod suspend;
mod wake;
