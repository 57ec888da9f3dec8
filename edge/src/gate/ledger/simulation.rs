//! Whole lives of an app, by seeds: Machines that start, hang, fail, sleep and die, clients that come in storms, wait,
//! give up and stay long. After each event everything that the ledger promises is looked at.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv6Addr;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use tern_catalog::ServiceProtocol;

use super::*;

const SEEDS: u64 = 2_000;
const EVENTS: u32 = 250;
const TIMEOUT: Duration = Duration::from_secs(30);
const PORTS: [Port; 2] = [
    Port {
        number: 80,
        protocol: ServiceProtocol::Tcp,
    },
    Port {
        number: 53,
        protocol: ServiceProtocol::Udp,
    },
];

struct World {
    random: StdRng,
    ledger: Ledger<u64>,
    now: Now,
    /// What the catalog says.
    machines: BTreeMap<MachineId, Facts>,
    starts: Vec<Start>,
    /// Places that were given, by who has them.
    places: HashMap<u64, Grant>,
    /// Who waits.
    waits: BTreeMap<u64, (Port, Ticket, Instant)>,
    came: u64,
    served: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            random: StdRng::seed_from_u64(seed),
            ledger: Ledger::new(),
            now: Now {
                at: Instant::now(),
                wall: "2026-01-01T00:00:00Z".parse().unwrap(),
            },
            machines: BTreeMap::new(),
            starts: Vec::new(),
            places: HashMap::new(),
            waits: BTreeMap::new(),
            came: 0,
            served: 0,
        }
    }

    fn pass(&mut self, most: Duration) {
        let time = self.random.random_range(Duration::from_micros(1)..=most);
        self.now.at += time;
        self.now.wall += time;
    }

    fn machine(&mut self) -> Option<MachineId> {
        let known = self.machines.len();
        let n = (known > 0).then(|| self.random.random_range(0..known))?;
        self.machines.keys().nth(n).cloned()
    }

    fn add(&mut self) {
        let id: MachineId = format!("{:014x}", self.random.random::<u32>())
            .parse()
            .unwrap();
        let soft = self.random.random_range(1..5);
        let hard = if self.random.random() {
            u32::MAX
        } else {
            soft + self.random.random_range(0..4)
        };
        let autostart = self.random.random_bool(0.8);
        let first = self.random.random_range(0..2);
        let last = self.random.random_range(first..2);
        let offers = PORTS[first..=last].iter().map(|&port| Offer {
            port,
            autostart,
            soft,
            hard,
        });
        let facts = Facts {
            address: Ipv6Addr::LOCALHOST,
            instance: "1".into(),
            eligible: true,
            seen: Some((MachineState::Stopped, self.now.wall)),
            offers: offers.collect(),
        };
        self.machines.insert(id.clone(), facts);
        self.says(&id, MachineState::Stopped);
    }

    /// The Machine's host says so.
    fn says(&mut self, id: &MachineId, state: MachineState) {
        let facts = self.machines.get_mut(id).unwrap();
        facts.seen = Some((state, self.now.wall));
        let facts = facts.clone();
        self.ledger.sync(id, facts, self.now);
        self.tick();
    }

    fn tick(&mut self) {
        let mut acts = Vec::new();
        self.ledger.tick(self.now, &mut acts);
        self.perform(acts);
    }

    fn perform(&mut self, acts: Vec<Act<u64>>) {
        for act in acts {
            match act {
                Act::Grant(who, grant) => {
                    let (port, ticket, _) = self.waits.remove(&who).expect("one that waited");
                    let earlier = self.waits.values().find(|w| w.0 == port && w.1 < ticket);
                    assert!(earlier.is_none(), "{who} was served before {earlier:?}");
                    self.takes(who, grant);
                }
                Act::Refuse(who, why) => {
                    let (port, ..) = self.waits.remove(&who).expect("one that waited");
                    self.nobody_could_serve(port, &why);
                }
                Act::Start(start) => {
                    let one = self.starts.iter().find(|s| s.machine == start.machine);
                    assert!(one.is_none(), "started twice at once");
                    let facts = &self.machines[&*start.machine];
                    let offer = facts.offers.iter().find(|o| o.port == start.port);
                    assert!(facts.eligible && offer.is_some_and(|o| o.autostart));
                    self.starts.push(start);
                }
                Act::SeenOff | Act::Alarm(_) => {}
            }
        }
    }

    fn takes(&mut self, who: u64, grant: Grant) {
        assert!(self.machines[&*grant.machine].eligible);
        self.served += 1;
        assert!(self.places.insert(who, grant).is_none());
    }

    fn nobody_could_serve(&self, port: Port, why: &Refused) {
        for (_, member, offer) in self.ledger.offers(port) {
            assert!(
                !member.runs(offer) && !member.is_waking(),
                "refused, though {} is there: {why}",
                member.id
            );
        }
    }

    fn arrive(&mut self) {
        self.pass(Duration::from_micros(5));
        self.came += 1;
        let (who, mut acts) = (self.came, Vec::new());
        let port = PORTS[self.random.random_range(0..2)];
        let arrival = self.ledger.arrive(port, self.now, true, || who, &mut acts);
        match arrival {
            Arrival::Granted(grant) => {
                assert!(self.waits.values().all(|w| w.0 != port), "out of turn");
                self.takes(who, grant);
            }
            Arrival::Refused(why) => self.nobody_could_serve(port, &why),
            Arrival::Waits(ticket) => {
                let wait = (port, ticket, self.now.at + TIMEOUT);
                self.waits.insert(who, wait);
            }
        }
        self.perform(acts);
    }

    fn end(&mut self, who: u64) {
        let grant = self.places.remove(&who).unwrap();
        let mut acts = Vec::new();
        self.ledger
            .end(grant.slot, grant.epoch, grant.port, self.now, &mut acts);
        self.perform(acts);
    }

    fn anybody(&mut self) -> Option<u64> {
        let least = self.places.keys().min().copied()?;
        // The order of a map's keys is not the seed's.
        let mut all: Vec<_> = self.places.keys().copied().collect();
        all.sort_unstable();
        let n = self.random.random_range(0..all.len());
        Some(all.get(n).copied().unwrap_or(least))
    }

    fn event(&mut self) {
        match self.random.random_range(0..100) {
            0..3 => self.add(),
            3..33 => self.arrive(),
            33..36 => {
                for _ in 0..self.random.random_range(1..60) {
                    self.arrive();
                }
            }
            36..58 => {
                if let Some(who) = self.anybody() {
                    self.end(who);
                }
            }
            58..70 => self.start_ends(),
            70..76 => {
                // A client goes away.
                if let Some((&who, &(port, ticket, _))) = self.waits.iter().next_back() {
                    assert!(self.ledger.cancel(port, ticket));
                    self.waits.remove(&who);
                }
            }
            76..84 => self.connects(),
            84..90 => self.falls_asleep(),
            90..94 => {
                if let Some(id) = self.machine() {
                    let facts = self.machines.get_mut(&id).unwrap();
                    facts.eligible = !facts.eligible;
                    let state = facts.seen.unwrap().0;
                    self.says(&id, state);
                }
            }
            94 => {
                let mut acts = Vec::new();
                let port = PORTS[self.random.random_range(0..2)];
                self.ledger.early(port, self.now, &mut acts);
                self.perform(acts);
            }
            95 => {
                if let Some(id) = self.machine() {
                    self.machines.remove(&id);
                    self.ledger.forget(&id);
                    self.starts.retain(|s| *s.machine != id);
                    self.tick();
                }
            }
            _ => {
                if let Some(id) = self.machine() {
                    self.says(&id, MachineState::Started);
                }
            }
        }
    }

    fn start_ends(&mut self) {
        if self.starts.is_empty() {
            return;
        }
        let n = self.random.random_range(0..self.starts.len());
        let start = self.starts.remove(n);
        if self.random.random_bool(0.3) {
            self.ledger.runs(&start, self.now);
        }
        let (id, well) = (start.machine.clone(), self.random.random_bool(0.7));
        let outcome = if well {
            Ok((start.port, start.address))
        } else {
            Err(NotStarted {
                why: StartError { text: "no".into() },
                by_itself: self.random.random(),
            })
        };
        let mut acts = Vec::new();
        self.ledger.started(&start, outcome, self.now, &mut acts);
        self.perform(acts);
        self.pass(Duration::from_millis(5));
        self.says(
            &id,
            if well {
                MachineState::Started
            } else {
                MachineState::Failed
            },
        );
    }

    fn connects(&mut self) {
        let Some(who) = self.anybody() else {
            return;
        };
        let grant = &self.places[&who];
        let (slot, epoch, port) = (grant.slot, grant.epoch, grant.port);
        let address = grant.address;
        if self.random.random() {
            self.ledger.reached(slot, epoch, port, address);
            return;
        }
        let member = self.ledger.members[slot.0].as_ref();
        let before = member.is_some_and(Member::is_awake);
        let proven = member.is_some_and(|m| m.is_proven(port));
        let refused = self.random.random();
        let mut acts = Vec::new();
        self.ledger
            .doubt(slot, epoch, port, refused, self.now, &mut acts);
        if proven && before {
            let after = self.ledger.members[slot.0].as_ref();
            assert!(
                after.is_some_and(Member::is_awake),
                "demoted by one failure"
            );
        }
        self.perform(acts);
    }

    fn falls_asleep(&mut self) {
        let Some(id) = self.machine() else {
            return;
        };
        let mut acts = Vec::new();
        if self.random.random() {
            let (_, busy) = self.ledger.load(&id);
            let idle = Duration::from_millis(1);
            let laid = self.ledger.lay_down(&id, idle, None, self.now);
            assert!(!laid || busy == 0, "laid down with {busy} requests");
            if laid {
                let sleeps = self.random.random();
                self.ledger.laid_down(&id, sleeps, self.now, &mut acts);
            }
        } else {
            self.ledger.depart(&id, self.now, &mut acts);
        }
        self.perform(acts);
        self.pass(Duration::from_millis(5));
        if self.random.random() {
            self.says(&id, MachineState::Suspended);
        }
    }

    /// Time passes: alarms ring, and those whose patience has ended go.
    fn time(&mut self) {
        let long = self.random.random_bool(0.1);
        self.pass(Duration::from_millis(if long { 20_000 } else { 200 }));
        if self.ledger.alarm.is_some_and(|at| at <= self.now.at) {
            self.tick();
        }
        let now = self.now.at;
        let late = self.waits.extract_if(.., |_, wait| wait.2 <= now);
        for (_, (port, ticket, _)) in late.collect::<Vec<_>>() {
            assert!(self.ledger.expire(port, ticket).is_some());
        }
    }

    /// Limits, counts, and nobody who waits for what is there.
    fn check(&self) {
        assert_eq!(self.ledger.waiting(), self.waits.len());
        let mut load: HashMap<&MachineId, u32> = HashMap::new();
        for grant in self.places.values() {
            *load.entry(&grant.machine).or_default() += 1;
        }
        for member in self.ledger.members.iter().flatten() {
            let has = load.remove(&*member.id).unwrap_or(0);
            assert_eq!(member.in_flight, has);
            assert!(member.earlier <= has);
            for offer in member.facts.iter().flat_map(|f| &f.offers) {
                let mut here = 0;
                for grant in self.places.values() {
                    here += u32::from(grant.machine == member.id && grant.port == offer.port);
                }
                assert!(member.load(offer.port) == here && here <= offer.hard);
            }
        }
        assert!(load.is_empty(), "nobody knows {load:?}");
        for port in self.waits.values().map(|wait| wait.0) {
            for (_, member, offer) in self.ledger.offers(port) {
                let idle = member.load(port) < offer.soft;
                assert!(!member.runs(offer) || !idle, "{} is idle", member.id);
            }
            let starting = self.ledger.survey(port, self.now.at).starting;
            let able = self
                .ledger
                .offers(port)
                .find(|(_, m, offer)| !starting && m.runs(offer) && m.load(port) < offer.hard);
            assert!(able.is_none(), "somebody waits in vain");
        }
        if !self.waits.is_empty() {
            let alarm = self.ledger.alarm.unwrap_or(self.now.at);
            assert!(alarm >= self.now.at, "nobody will look");
        }
    }
}

#[test]
fn a_ledger_keeps_its_promises_whatever_happens() {
    let mut served = 0;
    for seed in 0..SEEDS {
        let mut world = World::new(seed);
        let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            world.add();
            for _ in 0..EVENTS {
                world.event();
                world.time();
                world.check();
            }
            // All that began ends, and nothing is left.
            while !world.starts.is_empty() {
                world.start_ends();
            }
            while let Some(who) = world.anybody() {
                world.end(who);
                world.check();
            }
            for id in world.machines.keys().cloned().collect::<Vec<_>>() {
                world.machines.remove(&id);
                world.ledger.forget(&id);
            }
            world.starts.clear();
            world.tick();
            assert!(world.ledger.waiting() == 0, "nobody is left to wait for");
        }));
        assert!(told.is_ok(), "seed {seed}");
        served += world.served;
    }
    assert!(served > SEEDS * 20, "requests were served: {served}");
}
