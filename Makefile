# Everything a person can run here. Each target installs what it lacks and says so.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.PHONY: help demo test check check-deep bench bench-edge bench-monitor build install uninstall deb kernel fmt clean

help:          ## Show this list
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo:          ## From nothing to an HTTPS reply of a Machine that was asleep, with a timeline (half an hour at first)
	@.ci/demo

test:          ## All tests: units here, end-to-end in a host with true KVM
	@.ci/test

check:         ## Format, lints, documentation, dependencies
	@.ci/setup build check
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --document-private-items
	@.ci/deny

check-deep:    ## Two hours: every fuzz target for TERN_FUZZ_SECONDS=60, and the long way of the endurance tests
	@.ci/check-deep

bench:         ## Wake latency beside a warm request and a cold start: a table and a plot
	@.ci/bench

bench-edge:    ## The edge beside nginx, HAProxy and Caddy: processor time, memory (ROUNDS=5 CASES= CONTENDERS=)
	@.ci/bench-edge

bench-monitor: ## The monitor beside QEMU's microvm: start, restore, memory
	@.ci/bench-monitor

build:         ## The programs, the guest's kernel and initramfs, the examples' images
	@.ci/setup build guest demo
	@.ci/build

install:       ## The service: programs, unit, manual, /etc/tern/tern.toml (DESTDIR= PREFIX=/usr/local); starts nothing
	@.ci/setup build guest
	@packaging/package build
	@packaging/package install

uninstall:     ## Takes them away; configuration, data and Machines stay
	@packaging/package uninstall

deb:           ## The same as a Debian package, in target/package
	@.ci/setup build guest
	@packaging/package build
	@packaging/package deb

kernel:        ## The guest's small kernel (15 minutes, once): Machines start faster with it
	@.ci/setup kernel
	@vmm/kernel/make-kernel.sh

fmt:           ## Format the source
	cargo fmt --all

clean:         ## Remove what was built here (caches outside the checkout stay)
	cargo clean
