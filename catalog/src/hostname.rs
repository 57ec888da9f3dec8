//! Host names as people write them: in their own script, in capitals, with the root's dot.
//!
//! What is stored, compared and asked for in DNS and TLS is the one form that [`Hostname`] has: A-labels (RFC 5890),
//! lowercase, without the dot.

use crate::names::{Hostname, NameError};

/// Ends of names that no public directory issues for, and that lead elsewhere on each machine (RFC 6761, 6762,
/// 7686; `internal` is ICANN's for private use, and our own resolver's).
const PRIVATE: [&str; 5] = ["internal", "invalid", "local", "localhost", "onion"];

impl Hostname {
    /// A name as somebody wrote it, made what it is stored as (UTS #46, not transitional).
    pub fn typed(given: &str) -> Result<Self, NameError> {
        let refused = |rule| NameError::new("host name", given, rule);
        let address = "it is an IP address; point a host name at it, and add that";
        let text = given.trim();
        let text = text.strip_suffix('.').unwrap_or(text);
        if text.parse::<std::net::IpAddr>().is_ok() {
            return Err(refused(address));
        }
        let ascii = idna::domain_to_ascii(text).map_err(|_| {
            refused("use DNS labels joined by dots, in any script that domain names may have")
        })?;
        // After it is mapped: digits have other forms too.
        if ends_in_a_number(&ascii) {
            return Err(refused(address));
        }
        let hostname: Self = ascii.parse()?;
        if PRIVATE.contains(&hostname.last_label()) {
            return Err(refused(
                "names with this end are private: no directory issues a certificate for them",
            ));
        }
        Ok(hostname)
    }

    /// The name for people: in its own script where that is what its A-labels stand for.
    pub fn shown(&self) -> String {
        let (text, valid) = idna::domain_to_unicode(self.as_str());
        match valid {
            Ok(()) => text,
            Err(_) => self.to_string(),
        }
    }

    /// The name itself, or one below this domain.
    pub fn is_in(&self, domain: &str) -> bool {
        let rest = self.as_str().strip_suffix(domain);
        rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }

    fn last_label(&self) -> &str {
        let text = self.as_str();
        text.rsplit_once('.').map_or(text, |(_, last)| last)
    }
}

/// What browsers and resolvers take for an IPv4 address, in whatever base (WHATWG URL, "ends in a number").
fn ends_in_a_number(text: &str) -> bool {
    let last = text.rsplit_once('.').map_or(text, |(_, last)| last);
    let hexadecimal = last
        .strip_prefix("0x")
        .is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
    hexadecimal || (!last.is_empty() && last.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn typed(given: &str) -> String {
        Hostname::typed(given).unwrap().to_string()
    }

    #[test]
    fn one_name_has_one_form_however_it_is_written() {
        for given in [
            "bücher.example",
            "BÜCHER.example",
            "bu\u{308}cher.Example.",
            "xn--bcher-kva.example",
            " XN--BCHER-KVA.EXAMPLE ",
            "bücher。example",
        ] {
            assert_eq!(typed(given), "xn--bcher-kva.example", "{given}");
        }
        let stored = Hostname::typed("bücher.example").unwrap();
        assert_eq!(stored.shown(), "bücher.example");
        assert_eq!(typed("straße.example"), "xn--strae-oqa.example");
        assert_eq!(
            Hostname::typed("shop.example").unwrap().shown(),
            "shop.example"
        );
    }

    #[test]
    fn addresses_and_private_names_are_refused_with_the_reason() {
        for (given, reason) in [
            ("1.2.3.4", "IP address"),
            ("1.2.3.4.", "IP address"),
            ("127.1", "IP address"),
            ("１.２.３.４", "IP address"),
            ("0x7f.0x1", "IP address"),
            ("shop.0X7F", "IP address"),
            ("::1", "IP address"),
            ("2001:db8::1", "IP address"),
            ("shop.internal", "private"),
            ("printer.local.", "private"),
            ("a.LOCALHOST", "private"),
            ("shop", "DNS labels"),
            ("a..example", "DNS labels"),
            (".example", "DNS labels"),
            ("a.example..", "DNS labels"),
            ("-a.example", "DNS labels"),
            ("a_b.example", "DNS labels"),
            ("*.example", "DNS labels"),
            ("xn--a.example", "DNS labels"),
            ("a/b.example", "DNS labels"),
            ("", "DNS labels"),
        ] {
            let error = Hostname::typed(given).unwrap_err().to_string();
            assert!(error.contains(reason), "{given}: {error}");
        }
    }

    #[test]
    fn a_domain_holds_itself_and_what_is_below_it() {
        let name = |n: &str| n.parse::<Hostname>().unwrap();
        assert!(name("apps.example").is_in("apps.example"));
        assert!(name("a.apps.example").is_in("apps.example"));
        assert!(!name("myapps.example").is_in("apps.example"));
        assert!(!name("apps.example.org").is_in("apps.example"));
    }

    proptest! {
        #[test]
        fn what_is_stored_is_written_back_as_itself(given in "\\PC{0,12}(\\.\\PC{1,8}){1,3}\\.?") {
            if let Ok(stored) = Hostname::typed(&given) {
                prop_assert_eq!(&Hostname::typed(stored.as_str()).unwrap(), &stored);
                prop_assert_eq!(&Hostname::typed(&stored.shown()).unwrap(), &stored);
            }
        }
    }
}
