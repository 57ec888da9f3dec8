//! How many connections there may be, of all clients and of each, and which one goes when there is no room: the one
//! that has been idle the longest.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Room for connections over TCP, shared by all threads.
#[derive(Debug)]
pub struct Places {
    all: Arc<Semaphore>,
    of_one_client: u32,
    clients: Mutex<HashMap<Client, u32>>,
    /// Connections that wait for a place: as long as there are any, no other stays idle.
    waiting: AtomicUsize,
}

/// One connection's room.
pub struct Place {
    places: Arc<Places>,
    client: Client,
    _one: OwnedSemaphorePermit,
}

/// Who counts as one client: an IPv4 address, or the 64 bits that a site of IPv6 is given at least (RFC 6177).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Client {
    /// An address.
    V4([u8; 4]),
    /// A prefix.
    V6(u64),
}

/// The connections of one thread.
pub struct Connections {
    /// Rises with each connection that becomes idle.
    clock: Cell<u64>,
    next: Cell<u64>,
    known: RefCell<HashMap<u64, Rc<State>>>,
    places: Arc<Places>,
    ending: CancellationToken,
}

struct State {
    /// When it became idle, by the thread's clock; 0 while it is not.
    idle_since: Cell<u64>,
    /// It came then, and has asked for nothing yet: what it asks may be on its way.
    fresh: Cell<Option<Instant>>,
    ending: CancellationToken,
}

/// How often room is looked for again while somebody waits for it.
const AGAIN: Duration = Duration::from_millis(200);
/// What a connection that has asked for nothing yet is given before it may be ended for want of room: a round trip or
/// two, and its handshake's computing.
const FRESH: Duration = Duration::from_secs(2);

/// A connection of this thread.
pub struct Open {
    id: u64,
    state: Rc<State>,
    thread: Rc<Connections>,
}

impl Places {
    pub fn new(all: usize, of_one_client: usize) -> Self {
        Self {
            all: Arc::new(Semaphore::new(all.min(Semaphore::MAX_PERMITS))),
            of_one_client: of_one_client.try_into().unwrap_or(u32::MAX),
            clients: Mutex::default(),
            waiting: AtomicUsize::new(0),
        }
    }

    /// A place, once there is one, unless this client has as many as it may. `full` is called when there is none, and
    /// again now and then: what may be ended may become so only later, and on another thread.
    pub async fn take(self: &Arc<Self>, client: IpAddr, full: impl Fn()) -> Option<Place> {
        let counted = self.count(client)?;
        let one = match Arc::clone(&self.all).try_acquire_owned() {
            Ok(one) => one,
            Err(_) => {
                // Before others are looked at: one that becomes idle from now on sees it.
                let _waits = Waits::new(&self.waiting);
                let one = Arc::clone(&self.all).acquire_owned();
                tokio::pin!(one);
                loop {
                    full();
                    if let Ok(one) = tokio::time::timeout(AGAIN, one.as_mut()).await {
                        break one.ok()?;
                    }
                }
            }
        };
        Some(counted.placed(one))
    }

    /// A place, if there is one at once, and this client may have one more.
    pub fn try_take(self: &Arc<Self>, client: IpAddr) -> Option<Place> {
        let counted = self.count(client)?;
        let one = Arc::clone(&self.all).try_acquire_owned().ok()?;
        Some(counted.placed(one))
    }

    fn count(self: &Arc<Self>, client: IpAddr) -> Option<CountedClient<'_>> {
        let client = Client::of(client);
        let mut clients = self.clients.lock();
        let count = clients.entry(client).or_default();
        if *count >= self.of_one_client {
            return None;
        }
        *count += 1;
        Some(CountedClient {
            places: self,
            client,
        })
    }

    fn give_back(&self, client: Client) {
        let mut clients = self.clients.lock();
        if let Some(count) = clients.get_mut(&client) {
            *count -= 1;
            if *count == 0 {
                clients.remove(&client);
            }
        }
    }
}

/// One that waits for a place, counted until it is dropped.
struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::SeqCst);
        Self(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A client's count, given back if it gets no place.
struct CountedClient<'a> {
    places: &'a Arc<Places>,
    client: Client,
}

impl CountedClient<'_> {
    fn placed(self, one: OwnedSemaphorePermit) -> Place {
        let place = Place {
            places: Arc::clone(self.places),
            client: self.client,
            _one: one,
        };
        // The place counts from now on.
        std::mem::forget(self);
        place
    }
}

impl Drop for CountedClient<'_> {
    fn drop(&mut self) {
        self.places.give_back(self.client);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.give_back(self.client);
    }
}

impl Client {
    pub fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address.octets()),
            IpAddr::V6(address) => {
                // What follows is a host's own.
                Self::V6((address.to_bits() >> 64) as u64)
            }
        }
    }
}

impl Connections {
    pub fn new(ending: &CancellationToken, places: Arc<Places>) -> Self {
        Self {
            clock: Cell::new(0),
            next: Cell::new(0),
            known: RefCell::default(),
            places,
            ending: ending.child_token(),
        }
    }

    /// A new connection, known until it is dropped. It is not idle.
    pub fn open(self: &Rc<Self>) -> Open {
        let id = self.next.get();
        self.next.set(id + 1);
        let state = Rc::new(State {
            idle_since: Cell::new(0),
            fresh: Cell::new(Some(Instant::now())),
            ending: self.ending.child_token(),
        });
        self.known.borrow_mut().insert(id, Rc::clone(&state));
        Open {
            id,
            state,
            thread: Rc::clone(self),
        }
    }

    /// Has those end that have been idle the longest: some, so that the next that need room find it. Tells how many.
    pub fn shed(&self) -> usize {
        let known = self.known.borrow();
        let fresh = |state: &State| state.fresh.get().is_some_and(|at| at.elapsed() < FRESH);
        let idle = |state: &&Rc<State>| {
            state.idle_since.get() > 0 && !state.ending.is_cancelled() && !fresh(state)
        };
        let mut idle: Vec<&Rc<State>> = known.values().filter(idle).collect();
        let count = (1 + idle.len() / 64).min(idle.len());
        if count > 0 {
            idle.select_nth_unstable_by_key(count - 1, |state| state.idle_since.get());
        }
        for state in &idle[..count] {
            state.ending.cancel();
        }
        count
    }
}

impl Open {
    /// Nothing is under way: it may be ended.
    pub fn is_idle(&self) {
        let now = self.thread.clock.get() + 1;
        self.thread.clock.set(now);
        self.state.idle_since.set(now);
        if self.state.fresh.get().is_none() && self.thread.places.waiting.load(Ordering::SeqCst) > 0
        {
            self.state.ending.cancel();
        }
    }

    /// Something is under way.
    pub fn is_busy(&self) {
        self.state.idle_since.set(0);
        self.state.fresh.set(None);
    }

    /// Set when it takes no more requests.
    pub fn ending(&self) -> &CancellationToken {
        &self.state.ending
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.thread.known.borrow_mut().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_client_has_its_share_and_others_theirs() {
        let places = Arc::new(Places::new(10, 2));
        let take = |address: &str| {
            let (places, address) = (Arc::clone(&places), address.parse().unwrap());
            async move { places.take(address, || panic!("there is room")).await }
        };
        let one = take("192.0.2.1").await;
        let _two = take("::ffff:192.0.2.1").await;
        assert!(one.is_some() && take("192.0.2.1").await.is_none());
        let _other = take("192.0.2.2").await;
        // A site of IPv6 is one client.
        let six = [take("2001:db8::1").await, take("2001:db8::2").await];
        assert!(six.iter().all(Option::is_some) && take("2001:db8::3").await.is_none());
        assert!(take("2001:db8:0:1::1").await.is_some());
        drop(one);
        assert!(take("192.0.2.1").await.is_some());
        drop(six);
        assert_eq!(places.clients.lock().len(), 2);
    }

    #[tokio::test]
    async fn whoever_finds_no_place_has_room_made() {
        let places = Arc::new(Places::new(1, 9));
        let client = "192.0.2.1".parse().unwrap();
        let first = places.take(client, || panic!("there is room")).await;
        let asked = Cell::new(false);
        let second = places.take(client, || asked.set(true));
        tokio::pin!(second);
        let pending = futures::poll!(second.as_mut()).is_pending();
        assert!(pending && asked.get());
        drop(first);
        assert!(second.await.is_some());
        assert!(places.clients.lock().is_empty());
    }

    #[tokio::test]
    async fn one_that_never_asks_makes_room_in_the_end() {
        let places = Arc::new(Places::new(1, 9));
        let client = "192.0.2.1".parse().unwrap();
        let thread = Connections::new(&CancellationToken::new(), Arc::clone(&places));
        let thread = Rc::new(thread);
        let first = places.take(client, || panic!("there is room")).await;
        let silent = thread.open();
        silent.is_idle();
        let begun = Instant::now();
        let second = places.take(client, || {
            thread.shed();
        });
        let silence = async {
            silent.ending().cancelled().await;
            drop(first);
        };
        let (second, ()) = tokio::join!(second, silence);
        assert!(second.is_some() && begun.elapsed() >= FRESH);
    }

    #[tokio::test]
    async fn who_becomes_idle_while_others_wait_makes_room() {
        let places = Arc::new(Places::new(1, 9));
        let client = "192.0.2.1".parse().unwrap();
        let thread = Connections::new(&CancellationToken::new(), Arc::clone(&places));
        let thread = Rc::new(thread);
        let first = places.take(client, || panic!("there is room")).await;
        let busy = thread.open();
        let second = places.take(client, || assert_eq!(thread.shed(), 0));
        tokio::pin!(second);
        assert!(futures::poll!(second.as_mut()).is_pending());
        assert!(!busy.ending().is_cancelled());
        // It has just come: what it asks may be on its way.
        busy.is_idle();
        assert!(!busy.ending().is_cancelled());
        busy.is_busy();
        busy.is_idle();
        assert!(busy.ending().is_cancelled());
        drop((busy, first));
        assert!(second.await.is_some());
        // Nobody waits any more.
        let next = thread.open();
        next.is_idle();
        assert!(!next.ending().is_cancelled());
    }

    #[test]
    fn the_longest_idle_goes_first_and_no_busy_one() {
        let places = Arc::new(Places::new(9, 9));
        let thread = Rc::new(Connections::new(&CancellationToken::new(), places));
        let all: Vec<Open> = (0..4).map(|_| thread.open()).collect();
        assert_eq!(thread.shed(), 0);
        for n in [2, 0, 1, 3] {
            all[n].is_busy();
            all[n].is_idle();
        }
        all[2].is_busy();
        assert_eq!(thread.shed(), 1);
        let ended = |n: usize| all[n].ending().is_cancelled();
        assert_eq!([0, 1, 2, 3].map(ended), [true, false, false, false]);
        assert_eq!(thread.shed(), 1);
        assert_eq!([0, 1, 2, 3].map(ended), [true, true, false, false]);
        drop(all);
        assert!(thread.known.borrow().is_empty());
    }
}
