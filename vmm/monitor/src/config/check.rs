//! What a `vm.json` must keep to, beyond its types.

use super::{ConfigError, RateLimit, VmConfig};

/// Most processors a guest can have: what the issue of a small cloud needs, and one MADT entry each.
pub const MAX_VCPUS: u8 = 8;
/// Less does not boot a stock kernel with its initramfs.
pub const MIN_MEMORY_MIB: u32 = 32;
/// A bound on what a typing error may ask of the host.
const MAX_MEMORY_MIB: u32 = 256 * 1024;
/// Interrupt lines 5 to 23 of the one IOAPIC, less vsock, rng and balloon.
const MAX_DISKS: usize = 8;
/// See [`MAX_DISKS`].
const MAX_NICS: usize = 8;
/// `sun_path` is 108 bytes with its NUL; leave room for `_<port>` too.
const MAX_SOCKET_PATH: usize = 96;
/// `IFNAMSIZ` less the NUL.
const MAX_TAP_NAME: usize = 15;
/// Linux on x86 takes 2048 bytes; the monitor's own words need some 300.
const MAX_CMDLINE: usize = 1536;
/// 0 to 2 are reserved (hypervisor, loopback, host).
const MIN_GUEST_CID: u32 = 3;

impl VmConfig {
    /// Checks every limit, and says which one is broken.
    pub fn check(&self) -> Result<(), ConfigError> {
        let require = |ok: bool, what: &dyn Fn() -> String| {
            if ok {
                Ok(())
            } else {
                Err(ConfigError::Invalid(what()))
            }
        };
        require(!self.id.is_empty() && self.id.len() <= 128, &|| {
            "id must be 1 to 128 bytes long".into()
        })?;
        require((1..=MAX_VCPUS).contains(&self.vcpus), &|| {
            format!("vcpus is {}, must be 1 to {MAX_VCPUS}", self.vcpus)
        })?;
        require(
            (MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&self.memory_mib),
            &|| {
                format!(
                    "memory_mib is {}, must be {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}",
                    self.memory_mib
                )
            },
        )?;
        require(self.disks.len() <= MAX_DISKS, &|| {
            format!("{} disks, at most {MAX_DISKS}", self.disks.len())
        })?;
        for (name, limit) in self.rate_limits() {
            limit.check(name)?;
        }
        require(self.net.len() <= MAX_NICS, &|| {
            format!("{} network devices, at most {MAX_NICS}", self.net.len())
        })?;
        require(self.cmdline.len() <= MAX_CMDLINE, &|| {
            format!(
                "cmdline is {} bytes long, at most {MAX_CMDLINE}",
                self.cmdline.len()
            )
        })?;
        require(
            self.cmdline.bytes().all(|b| (b' '..=b'~').contains(&b)),
            &|| "cmdline must be printable ASCII".into(),
        )?;
        for nic in &self.net {
            let name = &nic.tap;
            require(
                !name.is_empty()
                    && name.len() <= MAX_TAP_NAME
                    && name
                        .bytes()
                        .all(|b| b.is_ascii_graphic() && b != b'/' && b != b'%'),
                &|| format!("{name:?} is not a network device name"),
            )?;
            let limited = nic.receive_limit.is_some() || nic.transmit_limit.is_some();
            require(!(nic.vhost && limited), &|| {
                format!(
                    "net {name}: vhost keeps neither receive_limit nor transmit_limit; leave out either it or them"
                )
            })?;
            require(nic.mac.0[0] & 1 == 0, &|| {
                format!("{} is a multicast address", String::from(nic.mac))
            })?;
        }
        let mut sockets = vec![("control", &self.control)];
        if let Some(vsock) = &self.vsock {
            require(vsock.cid >= MIN_GUEST_CID && vsock.cid != u32::MAX, &|| {
                format!(
                    "vsock cid is {}, must be {MIN_GUEST_CID} or more",
                    vsock.cid
                )
            })?;
            sockets.push(("vsock path", &vsock.path));
        }
        if let Some(jail) = &self.jail {
            // The last one means "leave it as it is" (setresuid(2)).
            let unfit = [0, u32::MAX];
            require(
                !unfit.contains(&jail.uid) && !unfit.contains(&jail.gid),
                &|| "jail: uid and gid must be a user's, not root's or 4294967295".into(),
            )?;
            require(jail.root.is_absolute(), &|| {
                "jail: root must be an absolute path".into()
            })?;
            for (name, path) in [
                ("snapshot_dir", &self.snapshot_dir),
                ("exit_file", &self.exit_file),
            ] {
                let below = path.parent() == Some(&*jail.root);
                require(below, &|| {
                    format!("jail: {name} must be directly in its root")
                })?;
            }
        }
        for (name, path) in sockets {
            let length = path.as_os_str().len();
            require(length <= MAX_SOCKET_PATH, &|| {
                format!("{name} is {length} bytes long, at most {MAX_SOCKET_PATH}")
            })?;
        }
        Ok(())
    }

    fn rate_limits(&self) -> impl Iterator<Item = (&'static str, &RateLimit)> {
        let disks = self
            .disks
            .iter()
            .map(|disk| ("rate_limit", &disk.rate_limit));
        let net = self.net.iter().flat_map(|nic| {
            [
                ("receive_limit", &nic.receive_limit),
                ("transmit_limit", &nic.transmit_limit),
            ]
        });
        disks
            .chain(net)
            .filter_map(|(name, limit)| Some((name, limit.as_ref()?)))
    }
}

impl RateLimit {
    fn check(&self, name: &str) -> Result<(), ConfigError> {
        let invalid = |what: &str| Err(ConfigError::Invalid(format!("{name}: {what}")));
        let rates = [
            (self.bytes_per_second, self.burst_bytes, "bytes"),
            (
                self.operations_per_second,
                self.burst_operations,
                "operations",
            ),
        ];
        if rates.iter().all(|(rate, ..)| rate.is_none()) {
            return invalid("has neither bytes_per_second nor operations_per_second");
        }
        for (rate, burst, what) in rates {
            if rate == Some(0) || burst == Some(0) {
                return invalid(&format!(
                    "no {what} at all would be a device that hangs; leave it out for no limit"
                ));
            }
            if rate.is_none() && burst.is_some() {
                return invalid(&format!("a burst of {what} without a rate"));
            }
        }
        Ok(())
    }
}
