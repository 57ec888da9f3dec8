//! Tells whoever brings a Machine its requests, the gate, that it is about to be put to sleep, so that what is
//! under way there can end and what is new waits for the next start.

use std::time::Duration;

use parking_lot::Mutex;
use tern_catalog::MachineId;
use tokio::sync::{mpsc, oneshot};

/// A Machine that is about to be suspended or stopped.
#[derive(Debug)]
pub struct Departure {
    /// Which.
    pub machine: MachineId,
    /// To be told, or dropped, when nothing is under way there any more. Closed when that has taken too long.
    pub ready: oneshot::Sender<()>,
    /// Told when it is suspended; dropped when it is not, or was stopped.
    pub suspended: oneshot::Receiver<()>,
}

/// Who is to be told, if anybody.
#[derive(Debug, Default)]
pub(crate) struct Departures(Mutex<Option<mpsc::UnboundedSender<Departure>>>);

impl Departures {
    /// From now on departures are told here, and to nobody else.
    pub(crate) fn follow(&self) -> mpsc::UnboundedReceiver<Departure> {
        let (tell, told) = mpsc::unbounded_channel();
        *self.0.lock() = Some(tell);
        told
    }

    /// Tells that a Machine is about to leave, and waits until it may, up to `limit`. What is returned is to be
    /// told when it is suspended.
    pub(crate) async fn announce(
        &self,
        machine: &MachineId,
        limit: Duration,
    ) -> oneshot::Sender<()> {
        let (ready, is_ready) = oneshot::channel();
        let (suspended, is_suspended) = oneshot::channel();
        let departure = Departure {
            machine: machine.clone(),
            ready,
            suspended: is_suspended,
        };
        // Where nobody follows, or does any more, it is dropped, and nothing waited for.
        match &*self.0.lock() {
            Some(tell) => _ = tell.send(departure),
            None => drop(departure),
        }
        if tokio::time::timeout(limit, is_ready).await.is_err() {
            tracing::debug!(%machine, "requests are under way that take long");
        }
        suspended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn a_departure_waits_for_its_requests_and_not_for_ever() {
        let departures = Departures::default();
        let machine = MachineId::random();
        // Nobody is there to be waited for.
        drop(departures.announce(&machine, NEVER).await);
        let mut told = departures.follow();
        let announced = departures.announce(&machine, NEVER);
        let see_off = async {
            let departure = told.recv().await.unwrap();
            departure.ready.send(()).unwrap();
            (departure.machine, departure.suspended)
        };
        let (left, (who, suspended)) = tokio::join!(announced, see_off);
        assert_eq!(who, machine);
        left.send(()).unwrap();
        suspended.await.unwrap();
        let left = departures.announce(&machine, Duration::ZERO).await;
        let departure = told.recv().await.unwrap();
        assert!(departure.ready.is_closed(), "it did not wait for ever");
        drop(left);
        assert!(departure.suspended.await.is_err(), "it was not suspended");
        drop(told);
        drop(departures.announce(&machine, NEVER).await);
    }
}
