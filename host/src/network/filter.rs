//! The one owner of the packet filter's table.
//!
//! Whoever may change packet filters may remove ours: `flush ruleset`, with which a restart of Debian's
//! `nftables.service` begins, does, and leaves every Machine open to every other. So the kernel is asked to
//! tell of each change, and one that was not made here is undone at once, whatever it was: the whole table is put in
//! place anew, in one transaction, and what may have begun in between is forgotten. Where that fails, the Machines' devices are taken down until it does not:
//! a Machine without a network is a fault that somebody sees.
//!
//! The kernel tells of transactions by number, and one after the other. Of each of our own it is known between
//! which two numbers it lies, and that it is told of once ([`Own`]); what is told beyond that is somebody else's.
//!
//! ```text
//!          foreign change, put back                 put back
//!           ┌───────┐                ┌────────────────────────────────┐
//!           ▼       │  cannot be put back                             │
//!         whole ────┴──────────────────► stopped (devices down) ──────┘ tried again and again
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use netlink_sys::Socket;
use rtnetlink::{Handle, MulticastGroup};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};

use super::netfilter::{Asking, LONGEST, Listener};
use super::rules::{self, Policy, Port};
use super::slot::Slot;
use super::{NetworkError, conntrack, tap, uplinks};

/// How soon after a look at the host's devices the next may be.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Waits between attempts to put the table back.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(5);

/// The table, and who may change it.
#[derive(Debug)]
pub(super) struct Filter {
    netlink: Handle,
    /// `nft`.
    program: PathBuf,
    state: tokio::sync::Mutex<State>,
    /// The slots whose devices were set up since the agent started, and are up. Changed by who holds the state.
    plugged: parking_lot::Mutex<BTreeMap<Slot, Ipv6Addr>>,
}

#[derive(Debug)]
struct State {
    policy: Policy,
    ports: BTreeMap<Slot, Port>,
    own: Own,
    asking: Asking,
    /// The Machines' devices are down because the table is not there.
    stopped: bool,
    /// Devices that were taken down for that, and are not up again.
    down: BTreeSet<Slot>,
}

/// What is believed of a table that cannot be put in place anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trust {
    /// Nothing: somebody has changed it.
    Nothing,
    /// If it is there, it is as it was made: else there will be news.
    WhatIsThere,
}

/// Our own transactions that have not been told of.
#[derive(Debug, Default)]
struct Own(VecDeque<Between>);

/// A transaction lies after this one, and not after that one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Between {
    after: u32,
    until: u32,
}

/// Hears of changes.
pub(super) struct Watch {
    filters: AsyncFd<Socket>,
    listener: Listener,
    /// That something about devices or routes has changed.
    devices: BoxStream<'static, ()>,
}

impl State {
    /// The table is there, and so are the Machines' devices.
    fn is_whole(&self) -> bool {
        !self.stopped && self.down.is_empty()
    }
}

impl Own {
    fn made(&mut self, after: u32, until: u32) {
        self.0.push_back(Between { after, until });
    }

    /// Whether the transaction that is told of may be ours; each is only once.
    fn includes(&mut self, told: u32) -> bool {
        // Numbers are told in order: what lies before this one was lost.
        while self.0.front().is_some_and(|own| is_before(own.until, told)) {
            self.0.pop_front();
        }
        let found = (self.0.iter())
            .position(|own| is_before(own.after, told) && !is_before(own.until, told));
        found.is_some_and(|at| self.0.remove(at).is_some())
    }
}

/// The order of numbers that begin anew when they are used up.
fn is_before(a: u32, b: u32) -> bool {
    a != b && b.wrapping_sub(a) < u32::MAX / 2
}

impl Filter {
    /// Puts the table in place, with these Machines.
    pub(super) async fn open(
        netlink: Handle,
        program: PathBuf,
        policy: Policy,
        ports: BTreeMap<Slot, Port>,
    ) -> Result<Self, NetworkError> {
        let state = State {
            policy,
            ports,
            own: Own::default(),
            asking: Asking::open().map_err(NetworkError::Open)?,
            stopped: false,
            down: BTreeSet::new(),
        };
        let filter = Self {
            netlink,
            program,
            plugged: parking_lot::Mutex::default(),
            state: tokio::sync::Mutex::new(state),
        };
        let mut state = filter.state.lock().await;
        let text = rules::table(state.ports.values(), &state.policy);
        let applied = filter.apply(&mut state, &text).await;
        applied.map_err(NetworkError::Rules)?;
        // Nobody knows what happened to the table before.
        super::forgotten(conntrack::forget_unfiltered).await?;
        drop(state);
        Ok(filter)
    }

    /// The Machines that have rules.
    pub(super) async fn ports(&self) -> BTreeMap<Slot, Port> {
        self.state.lock().await.ports.clone()
    }

    /// Whether it is nobody's turn at the table, and this slot has its rules.
    #[cfg(test)]
    pub(super) fn has_turn_for(&self, slot: Slot) -> bool {
        let state = self.state.try_lock();
        state.is_ok_and(|state| state.ports.contains_key(&slot))
    }

    /// Makes a Machine's device and rules. Costs nothing where that has been done.
    pub(super) async fn plug(&self, port: Port) -> Result<(), NetworkError> {
        let is_plugged = || self.plugged.lock().get(&port.slot) == Some(&port.address);
        if is_plugged() && super::exists(port.slot) {
            return Ok(());
        }
        // Throughout: no device may come up while the table goes away.
        let mut state = self.state.lock().await;
        // The rules first: a device must not be without.
        self.set(&mut state, port.slot, Some(port)).await?;

        self.bring_up(&mut state, port).await
    }

    /// Removes a Machine's device and rules. Returns what they were.
    pub(super) async fn unplug(&self, slot: Slot) -> Result<Option<Port>, NetworkError> {
        let mut state = self.state.lock().await;
        self.plugged.lock().remove(&slot);
        state.down.remove(&slot);
        tap::remove(&self.netlink, &slot.tap()).await?;
        self.set(&mut state, slot, None).await
    }

    /// Removes a Machine's rules, whatever its device. Returns what they were.
    pub(super) async fn cut_off(&self, slot: Slot) -> Result<Option<Port>, NetworkError> {
        let mut state = self.state.lock().await;
        // Not plugged in: the next one to take it up gives it its rules.
        self.plugged.lock().remove(&slot);
        state.down.remove(&slot);
        self.set(&mut state, slot, None).await
    }

    async fn bring_up(&self, state: &mut State, port: Port) -> Result<(), NetworkError> {
        tap::create(&self.netlink, port.slot, port.address).await?;
        self.plugged.lock().insert(port.slot, port.address);
        state.down.remove(&port.slot);
        Ok(())
    }

    /// Has a Machine's rules be these; `None` removes them. Returns what they were.
    async fn set(
        &self,
        state: &mut State,
        slot: Slot,
        port: Option<Port>,
    ) -> Result<Option<Port>, NetworkError> {
        let old = state.ports.get(&slot).copied();
        if old == port && !state.stopped {
            return Ok(old);
        }
        let elements = |verb, port: Option<Port>| {
            port.map_or_else(String::new, |port| rules::elements(verb, &port))
        };
        let text = elements("delete", old) + &elements("add", port);
        match port {
            Some(port) => state.ports.insert(slot, port),
            None => state.ports.remove(&slot),
        };
        let applied = match state.stopped {
            true => Err(io::Error::other("it is not there")),
            false => self.apply(state, &text).await,
        };
        let Err(error) = applied else {
            return Ok(old);
        };
        // Somebody else has touched the table, and the news of it is on its way; or the program does not work, and
        // the table is as it was.
        tracing::warn!(%error, "the packet filter is put in place anew");
        let restored = self.restore(state, Trust::WhatIsThere).await;
        if restored.is_err() {
            match old {
                Some(old) => state.ports.insert(slot, old),
                None => state.ports.remove(&slot),
            };
        }
        restored.map(|()| old)
    }

    /// Opens the ears for [`Filter::keep`], before the table is there.
    pub(super) fn watch() -> io::Result<Watch> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let (connection, _, devices) = rtnetlink::new_multicast_connection(&groups)?;
        // It ends when nobody listens to it any more.
        tokio::spawn(connection);
        // SAFETY: a `Socket` returns one descriptor, its own, and has it open for as long as it lives.
        let filters = unsafe { AsyncFd::register(Listener::socket()?) }?;
        Ok(Watch {
            filters,
            listener: Listener::default(),
            devices: devices.map(drop).boxed(),
        })
    }

    /// Keeps the table as it should be, for as long as the agent lives.
    pub(super) async fn keep(self: Arc<Self>, mut watch: Watch) {
        let (mut look_at, mut retry_at) = (None, None);
        let mut retry = FIRST_RETRY;
        loop {
            let whole = tokio::select! {
                told = hear(&mut watch.filters, &mut watch.listener) => self.told(told).await,
                () = due(retry_at) => self.try_again().await,
                Some(()) = watch.devices.next() => {
                    look_at.get_or_insert_with(|| Instant::now() + LOOK_AGAIN);
                    continue;
                }
                () = due(look_at) => {
                    let known = self.look().await;
                    look_at = (!known).then(|| Instant::now() + LOOK_AGAIN);
                    continue;
                }
            };
            (retry, retry_at) = match whole {
                true => (FIRST_RETRY, None),
                false => ((retry * 2).min(LAST_RETRY), Some(Instant::now() + retry)),
            };
        }
    }

    /// Undoes what somebody else has done to the table. `false` where it is not whole afterwards.
    async fn told(&self, told: io::Result<Vec<u32>>) -> bool {
        let mut state = self.state.lock().await;
        let foreign = match told {
            Ok(told) => {
                // All are asked: each that is ours is told of once.
                let foreign = told.into_iter().filter(|told| !state.own.includes(*told));
                foreign.count() > 0
            }
            Err(error) => {
                tracing::warn!(%error, "changes of packet filters have gone by unheard");
                // Not again and again without a pause, whatever it is.
                tokio::time::sleep(FIRST_RETRY).await;
                true
            }
        };
        if !foreign {
            return state.is_whole();
        }
        tracing::warn!(
            "somebody has changed the table inet tern, which keeps Machines apart; it is put in place anew. \
             A restart of nftables.service flushes all tables: reload other rules by their own tables"
        );
        let restored = self.restore(&mut state, Trust::Nothing).await;
        restored.is_ok() && state.is_whole()
    }

    /// Does what could not be done before. `false` where it still cannot.
    async fn try_again(&self) -> bool {
        let mut state = self.state.lock().await;
        if state.stopped {
            let restored = self.restore(&mut state, Trust::Nothing).await;
            return restored.is_ok() && state.is_whole();
        }
        self.raise(&mut state).await;
        state.is_whole()
    }

    /// Takes the Machines' devices down.
    async fn take_down(&self, state: &mut State) {
        for &slot in state.ports.keys() {
            if state.down.contains(&slot) {
                continue;
            }
            match tap::take_down(&self.netlink, slot).await {
                Ok(()) => {
                    state.down.insert(slot);
                    self.plugged.lock().remove(&slot);
                }
                Err(error) => tracing::error!(%error, "a Machine's traffic is not filtered"),
            }
        }
    }

    /// Has the devices up again that were taken down; those that do not come up are tried again.
    async fn raise(&self, state: &mut State) {
        for slot in std::mem::take(&mut state.down) {
            let port = state.ports.get(&slot).copied();
            let Some(port) = port.filter(|port| super::exists(port.slot)) else {
                continue; // whoever plugs it in makes it anew
            };
            if let Err(error) = self.bring_up(state, port).await {
                tracing::error!(%error, "a Machine is still without a network");
                state.down.insert(slot);
            }
        }
    }

    /// Puts the whole table in place, and the Machines' devices down where that fails, up where it does not.
    async fn restore(&self, state: &mut State, trust: Trust) -> Result<(), NetworkError> {
        let text = rules::table(state.ports.values(), &state.policy);
        let begun = Instant::now();
        let mut applied = self.apply(state, &text).await.map_err(NetworkError::Rules);
        if applied.is_ok() {
            // What began meanwhile must not go on.
            applied = super::forgotten(conntrack::forget_unfiltered).await;
        }
        match (&applied, state.stopped) {
            (Ok(()), false) => {
                tracing::info!(
                    ms = begun.elapsed().as_millis() as u64,
                    "the packet filter is in place"
                );
            }
            (Ok(()), true) => {
                state.stopped = false;
                tracing::info!("the packet filter is in place: Machines get their network back");
                self.raise(state).await;
            }
            (Err(_), false)
                if trust == Trust::WhatIsThere
                    && state.asking.has_table(rules::TABLE).is_ok_and(|is| is) => {}
            (Err(error), false) => {
                state.stopped = true;
                tracing::error!(
                    %error,
                    "the packet filter is not there, so Machines have no network until it is"
                );
                self.take_down(state).await;
            }
            (Err(error), true) => {
                tracing::debug!(%error, "the packet filter is still not there");
                self.take_down(state).await;
            }
        }
        applied
    }

    /// Looks which devices lead outside, and tells the rules. `false` where they do not know it then.
    async fn look(&self) -> bool {
        let found = match uplinks::find(&self.netlink).await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%error, "which devices lead outside is not known anew");
                return false;
            }
        };
        let mut state = self.state.lock().await;
        if found == state.policy.uplinks {
            return true;
        }
        let text = rules::other_uplinks(&state.policy.uplinks, &found);
        let before = std::mem::replace(&mut state.policy.uplinks, found);
        if !state.stopped
            && self.apply(&mut state, &text).await.is_err()
            && let Err(error) = self.restore(&mut state, Trust::WhatIsThere).await
            && !state.stopped
        {
            tracing::warn!(%error, "the packet filter does not know which devices lead outside");
            state.policy.uplinks = before;
            return false;
        }
        true
    }

    async fn apply(&self, state: &mut State, text: &str) -> io::Result<()> {
        let after = state.asking.generation()?;
        rules::apply(&self.program, text).await?;
        let until = state.asking.generation()?;
        state.own.made(after, until);
        Ok(())
    }
}

async fn due(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Waits for transactions that have to do with the table.
async fn hear(filters: &mut AsyncFd<Socket>, listener: &mut Listener) -> io::Result<Vec<u32>> {
    let mut buffer = Vec::with_capacity(LONGEST);
    loop {
        let mut ready = filters.readable().await?;
        buffer.clear();
        match ready.try_io(|socket| socket.get_ref().recv(&mut buffer, 0)) {
            Ok(Ok(_)) => {
                let told: Vec<u32> = listener.hear(&buffer, rules::TABLE).collect();
                if !told.is_empty() {
                    return Ok(told);
                }
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_own_transaction_is_told_of_once() {
        let mut own = Own::default();
        own.made(4, 5);
        assert!(!own.includes(4));
        assert!(own.includes(5) && !own.includes(5));
        // Somebody else's came in between: one of the two is ours, whichever is told of.
        own.made(5, 8);
        assert!(own.includes(6) && !own.includes(8));
        // One that was lost does not stand for others later on.
        own.made(8, 9);
        assert!(!own.includes(10));
        own.made(u32::MAX, 1);
        assert!(own.includes(0) && !own.includes(1));
    }
}
