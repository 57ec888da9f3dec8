//! What a deploy does, decided before it does anything: from the Machines there are and what is wanted, to steps.
//!
//! No I/O. A Machine without a volume is never changed in its place: its successor is made beside it, gets no requests
//! until it is well, and only then takes them over. One with a volume has its configuration changed, for the volume's
//! data cannot be in two: its host stops the old one first, and requests wait.

use std::collections::BTreeSet;
use std::fmt;

/// A Machine that there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Has {
    pub id: String,
    pub group: String,
    /// Whether it holds a volume.
    pub volume: bool,
    /// Whether it was made by a deploy that did not come to its end, and never got requests.
    pub leftover: bool,
}

/// What is wanted of a process group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wants {
    pub group: String,
    /// How many Machines; as many as there are, and at least one, where nobody says.
    pub count: Option<usize>,
    /// Whether its Machines hold a volume.
    pub volume: bool,
    /// Whether each Machine keeps the volume that it has, whatever the others hold.
    pub own_volumes: bool,
    /// Whether those that there are stay as they are.
    pub keep: bool,
}

/// How Machines are replaced.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum How {
    /// So many at a time: of all those of the group, this share, or this number.
    Rolling(AtOnce),
    /// One first, and then as by rolling.
    Canary(AtOnce),
    /// All are made before the first takes requests over.
    Bluegreen,
    /// In their places, without waiting.
    Immediate,
}

/// How many at a time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum AtOnce {
    Share(f64),
    Count(usize),
}

/// A Machine that is to be.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    pub group: String,
    /// Tells those of a group apart.
    pub n: usize,
    /// Whose place it takes.
    pub replaces: Option<String>,
}

/// Why a Machine goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// A deploy before has left it.
    Leftover,
    /// There is no such process group any more.
    NoGroup,
    /// There are more than wanted.
    TooMany,
}

/// One step. Each is whole before the next begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// New Machines, until they are well. They get no requests yet.
    Make(Vec<Place>),
    /// They get requests from here on; those that they replace get no more, end what is under way, and go.
    Swap(Vec<Place>),
    /// Another configuration in the same place, until it is well.
    Update { group: String, id: String },
    /// A Machine goes.
    Remove { id: String, why: Why },
}

/// The steps from what there is to what is wanted.
pub fn plan(has: &[Has], wants: &[Wants], how: How) -> Vec<Step> {
    let remove = |m: &Has, why| Step::Remove {
        id: m.id.clone(),
        why,
    };
    let (leftovers, has): (Vec<&Has>, Vec<&Has>) = has.iter().partition(|m| m.leftover);
    let mut steps: Vec<Step> = leftovers.iter().map(|m| remove(m, Why::Leftover)).collect();
    let mut last = Vec::new();
    let groups: BTreeSet<&str> = wants.iter().map(|w| w.group.as_str()).collect();
    for gone in has.iter().filter(|m| !groups.contains(m.group.as_str())) {
        last.push(remove(gone, Why::NoGroup));
    }
    // Of all groups where all are made before any takes over.
    let (mut all, mut updates) = (Vec::new(), Vec::new());
    for want in wants {
        let there: Vec<&Has> = has
            .iter()
            .filter(|m| m.group == want.group)
            .copied()
            .collect();
        let count = want.count.unwrap_or(there.len().max(1));
        let (stay, surplus) = there.split_at(count.min(there.len()));
        last.extend(surplus.iter().map(|m| remove(m, Why::TooMany)));
        let in_place =
            |m: &Has| (m.volume && (want.volume || want.own_volumes)) || how == How::Immediate;
        let mut places = Vec::new();
        for n in 0..count {
            match stay.get(n) {
                Some(_) if want.keep => {}
                Some(old) if in_place(old) => updates.push(Step::Update {
                    group: want.group.clone(),
                    id: old.id.clone(),
                }),
                old => places.push(Place {
                    group: want.group.clone(),
                    n,
                    replaces: old.map(|m| m.id.clone()),
                }),
            }
        }
        match how {
            How::Bluegreen => all.extend(places),
            How::Immediate => in_turns(&mut steps, &places, 0, count),
            How::Rolling(at_once) => in_turns(&mut steps, &places, 0, at_once.of(count)),
            How::Canary(at_once) => in_turns(&mut steps, &places, 1, at_once.of(count)),
        }
        if how != How::Bluegreen {
            steps.append(&mut updates);
        }
    }
    in_turns(&mut steps, &all, 0, all.len());
    steps.append(&mut updates);
    steps.append(&mut last);
    steps
}

fn in_turns(steps: &mut Vec<Step>, places: &[Place], first: usize, at_once: usize) {
    let (first, rest) = places.split_at(first.min(places.len()));
    let turns = [first].into_iter().chain(rest.chunks(at_once.max(1)));
    for turn in turns.filter(|turn| !turn.is_empty()) {
        steps.push(Step::Make(turn.to_vec()));
        steps.push(Step::Swap(turn.to_vec()));
    }
}

impl AtOnce {
    /// Of so many Machines.
    fn of(self, count: usize) -> usize {
        match self {
            // Small whole numbers.
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                clippy::cast_precision_loss
            )]
            Self::Share(share) => (share.clamp(0.0, 1.0) * count as f64) as usize,
            Self::Count(at_once) => at_once,
        }
        .max(1)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let listed = |places: &[Place], tell: &dyn Fn(&Place) -> String| {
            places.iter().map(tell).collect::<Vec<_>>().join(", ")
        };
        match self {
            Self::Make(places) => {
                let told = listed(places, &|p| match &p.replaces {
                    Some(old) => format!("a \"{}\" Machine beside {old}", p.group),
                    None => format!("a \"{}\" Machine", p.group),
                });
                write!(f, "Make {told}; wait until well, without requests")
            }
            Self::Swap(places) => {
                let told = listed(places, &|p| match &p.replaces {
                    Some(old) => format!("from {old} to its successor, and destroy {old}"),
                    None => format!("to the new \"{}\" Machine", p.group),
                });
                write!(f, "Give requests {told}")
            }
            Self::Update { id, group } => write!(
                f,
                "Update Machine {id} (\"{group}\") in its place; requests wait while it starts"
            ),
            Self::Remove { id, why } => {
                let why = match why {
                    Why::Leftover => "a deploy that was broken off has left it",
                    Why::NoGroup => "there is no such process group any more",
                    Why::TooMany => "there are more than wanted",
                };
                write!(f, "Destroy Machine {id}: {why}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn has(id: &str, group: &str) -> Has {
        Has {
            id: id.into(),
            group: group.into(),
            volume: false,
            leftover: false,
        }
    }

    fn wants(group: &str) -> Wants {
        Wants {
            group: group.into(),
            count: None,
            volume: false,
            own_volumes: false,
            keep: false,
        }
    }

    const ROLLING: How = How::Rolling(AtOnce::Share(0.33));

    fn told(has: &[Has], wants: &[Wants], how: How) -> Vec<String> {
        plan(has, wants, how).iter().map(Step::to_string).collect()
    }

    #[test]
    fn a_lone_machine_serves_until_its_successor_is_well() {
        assert_eq!(
            told(&[has("1", "app")], &[wants("app")], ROLLING),
            [
                "Make a \"app\" Machine beside 1; wait until well, without requests",
                "Give requests from 1 to its successor, and destroy 1",
            ]
        );
    }

    #[test]
    fn a_volume_is_never_in_two_machines() {
        let old = Has {
            volume: true,
            ..has("1", "app")
        };
        let want = Wants {
            volume: true,
            ..wants("app")
        };
        for how in [ROLLING, How::Bluegreen, How::Immediate] {
            let steps = plan(std::slice::from_ref(&old), std::slice::from_ref(&want), how);
            let update = Step::Update {
                group: "app".into(),
                id: "1".into(),
            };
            assert_eq!(steps, [update]);
        }
    }

    #[test]
    fn strategies_differ_in_how_many_are_made_at_a_time() {
        let six: Vec<Has> = (0..6).map(|n| has(&n.to_string(), "app")).collect();
        let turns = |how| -> Vec<usize> {
            let steps = plan(&six, &[wants("app")], how);
            let made = steps.iter().filter_map(|s| match s {
                Step::Make(places) => Some(places.len()),
                _ => None,
            });
            made.collect()
        };
        assert_eq!(turns(ROLLING), [1, 1, 1, 1, 1, 1]);
        assert_eq!(turns(How::Rolling(AtOnce::Share(0.5))), [3, 3]);
        assert_eq!(turns(How::Rolling(AtOnce::Count(4))), [4, 2]);
        assert_eq!(turns(How::Canary(AtOnce::Count(3))), [1, 3, 2]);
        assert_eq!(turns(How::Bluegreen), [6]);
        assert_eq!(turns(How::Immediate), [] as [usize; 0]);
    }

    fn some_has() -> impl Strategy<Value = Vec<Has>> {
        let one = (0..3_usize, any::<bool>(), prop::bool::weighted(0.2));
        prop::collection::vec(one, 0..8).prop_map(|all| {
            let machine = |(n, (group, volume, leftover)): (usize, (usize, bool, bool))| Has {
                id: n.to_string(),
                group: format!("g{group}"),
                volume,
                leftover,
            };
            all.into_iter().enumerate().map(machine).collect()
        })
    }

    fn some_wants() -> impl Strategy<Value = Vec<Wants>> {
        let one = (
            prop::option::of(0..5_usize),
            any::<(bool, bool)>(),
            any::<bool>(),
        );
        prop::collection::vec(one, 0..3).prop_map(|all| {
            type One = (Option<usize>, (bool, bool), bool);
            let want = |(n, (count, (volume, own_volumes), keep)): (usize, One)| Wants {
                group: format!("g{n}"),
                count,
                volume,
                own_volumes,
                keep,
            };
            all.into_iter().enumerate().map(want).collect()
        })
    }

    fn some_how() -> impl Strategy<Value = How> {
        let at_once = prop_oneof![
            (0.0..2.0_f64).prop_map(AtOnce::Share),
            (0..9_usize).prop_map(AtOnce::Count),
        ];
        (0..4, at_once).prop_map(|(how, at_once)| match how {
            0 => How::Rolling(at_once),
            1 => How::Canary(at_once),
            2 => How::Bluegreen,
            _ => How::Immediate,
        })
    }

    proptest! {
        /// Does the steps to a picture of the app, and looks at it after each.
        #[test]
        fn every_step_leaves_enough_that_serve(has in some_has(), wants in some_wants(), how in some_how()) {
            // Those that serve, by id; new ones by their place.
            let mut serving: BTreeMap<String, String> = has.iter()
                .filter(|m| !m.leftover)
                .map(|m| (m.id.clone(), m.group.clone()))
                .collect();
            let mut made: BTreeSet<Place> = BTreeSet::new();
            let mut touched: BTreeSet<String> = BTreeSet::new();
            let count = |serving: &BTreeMap<String, String>, group: &str| {
                serving.values().filter(|g| *g == group).count()
            };
            let before = serving.clone();
            let wanted = |want: &Wants| want.count.unwrap_or(count(&before, &want.group).max(1));
            for step in plan(&has, &wants, how) {
                match step {
                    Step::Make(places) => {
                        prop_assert!(!places.is_empty());
                        for place in places {
                            prop_assert!(made.insert(place), "made twice");
                        }
                    }
                    Step::Swap(places) => {
                        for place in places {
                            prop_assert!(made.remove(&place), "takes over before it is well");
                            serving.insert(format!("{}/{}", place.group, place.n), place.group.clone());
                            if let Some(old) = place.replaces {
                                let held = has.iter().any(|m| m.id == old && m.volume);
                                let own = wants.iter().any(|w| w.group == place.group && w.own_volumes);
                                prop_assert!(!(held && own), "its volume is left behind");
                                prop_assert_eq!(serving.remove(&old), Some(place.group));
                                prop_assert!(touched.insert(old));
                            }
                        }
                    }
                    Step::Update { id, group } => {
                        let old = has.iter().find(|m| m.id == id).unwrap();
                        prop_assert!(old.volume || how == How::Immediate);
                        prop_assert_eq!(&old.group, &group);
                        prop_assert!(touched.insert(id));
                    }
                    Step::Remove { id, .. } => {
                        serving.remove(&id);
                        prop_assert!(touched.insert(id));
                    }
                }
                for want in &wants {
                    let least = wanted(want).min(count(&before, &want.group));
                    prop_assert!(count(&serving, &want.group) >= least);
                }
            }
            prop_assert!(made.is_empty(), "made and never used: {:?}", made);
            for want in &wants {
                prop_assert_eq!(count(&serving, &want.group), wanted(want));
            }
            let all: usize = wants.iter().map(wanted).sum();
            prop_assert_eq!(serving.len(), all);
            // Nobody is forgotten but those that are kept.
            for old in &has {
                let kept = wants.iter().any(|w| w.keep && w.group == old.group);
                prop_assert!(kept || touched.contains(&old.id));
            }
        }
    }
}
