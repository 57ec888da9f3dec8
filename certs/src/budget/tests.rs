use proptest::prelude::*;

use super::*;

const SMALL: Limits = Limits {
    orders: 6,
    certificates: 4,
    duplicates: 2,
};

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).unwrap()
}

fn name(text: &str) -> Hostname {
    text.parse().unwrap()
}

#[test]
fn names_count_for_what_was_registered() {
    for (hostname, domain) in [
        ("example.com", "example.com"),
        ("a.b.example.com", "example.com"),
        ("a.example.co.uk", "example.co.uk"),
        ("shop.github.io", "shop.github.io"),
        ("a.shop.github.io", "shop.github.io"),
        ("co.uk", "co.uk"),
        ("shop.tern.test", "tern.test"),
        ("a.xn--bcher-kva.example", "xn--bcher-kva.example"),
    ] {
        assert_eq!(registered_domain(&name(hostname)), domain);
    }
}

#[test]
fn lets_encrypts_limits_are_kept() {
    let limits = Limits::of("https://acme-v02.api.letsencrypt.org/directory");
    let mut budget = Budget::load("le", limits, Vec::new());
    for i in 0..50 {
        let next = name(&format!("app{i}.apps.example.com"));
        budget.ask(&next, false, at(i)).unwrap();
        budget.ordered(&next, at(i));
    }
    let more = name("app50.apps.example.com");
    let held = budget.ask(&more, false, at(60)).unwrap_err();
    // A renewal is let through.
    budget.ask(&more, true, at(60)).unwrap();
    assert_eq!(held.until, at(7 * 24 * 3600));
    assert!(
        held.reason.contains("example.com has had 50"),
        "{}",
        held.reason
    );
    budget
        .ask(&name("shop.example.org"), false, at(60))
        .unwrap();

    let mut budget = Budget::load("le", limits, Vec::new());
    let same = name("shop.example.org");
    for i in 0..5 {
        budget.ask(&same, false, at(i)).unwrap();
        budget.ordered(&same, at(i));
    }
    let held = budget.ask(&same, false, at(60)).unwrap_err();
    assert!(
        held.reason.contains("shop.example.org has had 5"),
        "{}",
        held.reason
    );
    // One that came to nothing has cost no certificate.
    budget.lost(&same, at(3));
    budget.ask(&same, false, at(60)).unwrap();

    let mut budget = Budget::load("le", limits, Vec::new());
    for i in 0..300 {
        let next = name(&format!("shop.example{i}.com"));
        budget.ask(&next, false, at(i)).unwrap();
        budget.ordered(&next, at(i));
    }
    let held = budget.ask(&same, false, at(1000)).unwrap_err();
    assert_eq!(held.until, at(3 * 3600));

    assert!(Limits::of("https://localhost:14000/dir").is_none());
    assert!(Limits::of("https://acme-v02.api.letsencrypt.org.evil.example/").is_none());
}

#[test]
fn a_refusal_holds_its_domain_and_a_second_one_the_account() {
    let mut budget = Budget::load("x", None, Vec::new());
    let [a, b, c] = ["a.example.com", "b.example.org", "c.example.net"].map(name);
    budget.refused(&a, at(3600), false, at(0));
    for held in [&a, &name("other.example.com")] {
        assert_eq!(budget.ask(held, false, at(10)).unwrap_err().until, at(3600));
    }
    budget.ask(&b, false, at(10)).unwrap();
    let records = budget.refused(&b, at(7200), false, at(20));
    assert_eq!(budget.ask(&c, false, at(30)).unwrap_err().until, at(7200));
    // Also after a restart, and not for ever.
    let budget = Budget::load("x", None, records);
    assert_eq!(budget.ask(&c, false, at(30)).unwrap_err().until, at(7200));
    budget.ask(&c, false, at(7200)).unwrap();
    let other_directory = Budget::load("y", None, vec![budget.record(None)]);
    other_directory.ask(&c, false, at(30)).unwrap();

    let mut budget = Budget::load("x", None, Vec::new());
    budget.refused(&a, at(60), true, at(0));
    assert_eq!(budget.ask(&c, false, at(30)).unwrap_err().until, at(60));
}

/// Seconds to the next try, the name that tries, and whether its order is lost.
fn steps() -> impl Strategy<Value = Vec<(i64, usize, bool)>> {
    proptest::collection::vec(
        (0..200_000i64, 0..5usize, proptest::bool::weighted(0.2)),
        1..120,
    )
}

proptest! {
    #[test]
    fn no_window_ever_holds_more_than_the_limit_and_what_is_held_is_let_go(steps in steps()) {
        let names = ["a.example.com", "b.example.com", "c.example.com", "d.example.org", "e.example.net"].map(name);
        let mut budget = Budget::load("x", Some(SMALL), Vec::new());
        let mut kept: HashMap<String, AcmeUsage> = HashMap::new();
        let (mut orders, mut certificates) = (Vec::new(), Vec::new());
        let mut now = 0;
        for (pause, which, lost) in steps {
            now += pause;
            let hostname = &names[which];
            let answer = budget.ask(hostname, false, at(now));
            // What the catalog remembers answers alike.
            let again = Budget::load("x", Some(SMALL), kept.values().cloned().collect());
            prop_assert_eq!(&again.ask(hostname, false, at(now)), &answer);
            if let Err(held) = answer {
                prop_assert!(held.until > at(now));
                prop_assert!(budget.ask(hostname, false, held.until).is_ok());
                continue;
            }
            let mut changed = budget.ordered(hostname, at(now));
            orders.push(now);
            if lost {
                changed.extend(budget.lost(hostname, at(now)));
            } else {
                certificates.push((now, hostname.clone()));
            }
            for record in changed {
                prop_assert!(record.used.len() <= SMALL.orders.max(SMALL.certificates));
                kept.insert(record.id.clone(), record);
            }
        }
        let within = |times: &[i64], window: SignedDuration, most: usize| {
            times.iter().all(|end| {
                let begin = end - window.as_secs();
                times.iter().filter(|t| **t > begin && *t <= end).count() <= most
            })
        };
        prop_assert!(within(&orders, ORDERS_IN, SMALL.orders));
        for hostname in &names {
            let of = |counts: &dyn Fn(&Hostname) -> bool| -> Vec<i64> {
                certificates.iter().filter(|(_, h)| counts(h)).map(|(t, _)| *t).collect()
            };
            let domain = registered_domain(hostname);
            let of_domain = of(&|h| registered_domain(h) == domain);
            prop_assert!(within(&of_domain, CERTIFICATES_IN, SMALL.certificates));
            prop_assert!(within(&of(&|h| h == hostname), CERTIFICATES_IN, SMALL.duplicates));
        }
    }
}
