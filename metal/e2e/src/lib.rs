//! End-to-end tests, run inside metal
