use super::testing::{bare, with, without};
use super::*;

const TEMPLATES: [CpuTemplate; 2] = [CpuTemplate::X86_64V2, CpuTemplate::X86_64V3];

/// A host with every feature that there could be.
fn everything() -> CpuId {
    let mut host = bare(CpuTemplate::X86_64V3);
    for entry in host.as_mut_slice() {
        let lists: &[Register] = match (entry.function, entry.index) {
            (1 | 0x8000_0001, _) => &[Ecx, Edx],
            (7, 0) => &[Ebx, Ecx, Edx],
            // The third register is the number of cores.
            (0x8000_0008, _) => &[Ebx, Edx],
            (7 | 0x14 | 0xa | 0x8000_0007 | 0x8000_000a | 0x8000_0021, _) => &[Eax, Ebx, Ecx, Edx],
            (0xd, 0 | 1) => &[Eax, Edx],
            _ => &[],
        };
        for list in lists {
            match list {
                Eax => entry.eax = u32::MAX,
                Ebx => entry.ebx = u32::MAX,
                Ecx => entry.ecx = u32::MAX,
                Edx => entry.edx = u32::MAX,
            }
        }
    }
    host
}

/// The names of all features that a guest sees in the leaves that list them.
fn names(shown: &CpuId) -> Vec<String> {
    let mut names = Vec::new();
    for (leaf, index, list) in [
        (1, 0, Ecx),
        (1, 0, Edx),
        (7, 0, Ebx),
        (7, 0, Ecx),
        (7, 0, Edx),
        (0xd, 0, Eax),
        (0xd, 1, Eax),
        (0x8000_0001, 0, Ecx),
        (0x8000_0001, 0, Edx),
    ] {
        let value = find(shown, leaf, index).map_or(0, |entry| register(entry, list));
        let bits = (0..32).filter(|bit| value & 1 << bit != 0);
        names.extend(bits.map(|bit| name(leaf, index, list, bit)));
    }
    names
}

#[test]
fn levels_have_what_the_psabi_asks_for() {
    let v1 = "cmov cx8 fpu fxsr mmx syscall sse sse2";
    let v2 = "cx16 lahf_lm popcnt sse3 sse4_1 sse4_2 ssse3";
    let v3 = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave";
    let shown = |template: CpuTemplate| names(&template.apply(&everything()).unwrap());
    let (two, three) = (shown(CpuTemplate::X86_64V2), shown(CpuTemplate::X86_64V3));
    for word in format!("{v1} {v2}").split(' ') {
        assert!(two.iter().any(|n| n == word), "{word}: {two:?}");
    }
    for word in v3.split(' ') {
        assert!(!two.iter().any(|n| n == word), "{word}: {two:?}");
        assert!(three.iter().any(|n| n == word), "{word}: {three:?}");
    }
    assert!(two.iter().all(|name| three.contains(name)));
    // What has no name in the table is in none.
    assert!(
        three.iter().all(|name| !name.contains("CPUID")),
        "{three:?}"
    );
}

#[test]
fn more_of_a_host_shows_nothing_more_but_its_guards() {
    for template in TEMPLATES {
        let mut least = template.apply(&bare(template)).unwrap();
        let mut most = template.apply(&everything()).unwrap();
        for features in FEATURES.iter().filter(|f| f.when == When::IfThere) {
            let bits = features
                .bits
                .iter()
                .fold(0, |bits, (bit, _)| bits | 1 << bit);
            for shown in [&mut least, &mut most] {
                for entry in shown.as_mut_slice() {
                    if (entry.function, entry.index) == (features.leaf, features.index) {
                        match features.register {
                            Eax => entry.eax &= !bits,
                            Ebx => entry.ebx &= !bits,
                            Ecx => entry.ecx &= !bits,
                            Edx => entry.edx &= !bits,
                        }
                    }
                }
            }
        }
        assert_eq!(least.as_slice(), most.as_slice(), "{template}");
    }
}

#[test]
fn register_state_is_what_the_instructions_need() {
    let v3 = CpuTemplate::X86_64V3.apply(&everything()).unwrap();
    let area = find(&v3, 0xd, 0).unwrap();
    assert_eq!((area.eax, area.ecx, area.edx), (7, 832, 0));
    assert!(find(&v3, 0xd, 2).is_some());
    assert!(find(&v3, 0xd, 5).is_none());
    let v2 = CpuTemplate::X86_64V2.apply(&everything()).unwrap();
    assert!((0..6).all(|index| find(&v2, 0xd, index).is_none()));
}

#[test]
fn whole_leaves_are_hidden() {
    let shown = CpuTemplate::X86_64V3.apply(&everything()).unwrap();
    for leaf in [0xa, 0x14, 0x8000_0007, 0x8000_000a] {
        assert!(find(&shown, leaf, 0).is_none(), "{leaf:#x}");
    }
    assert!(find(&shown, 7, 1).is_none());
    assert_eq!(find(&shown, 0, 0).unwrap().eax, 0xd);
    assert_eq!(find(&shown, 0x8000_0000, 0).unwrap().eax, 0x8000_0021);
    assert_eq!(find(&shown, 0x8000_0008, 0).unwrap().eax, 48 << 8 | 39);
    // KVM's own leaves, without which there is no clock.
    assert!(find(&shown, 0x4000_0001, 0).is_some());
}

#[test]
fn a_host_with_less_is_told_what_it_lacks() {
    let template = CpuTemplate::X86_64V3;
    let host = without(&bare(template), 7, Ebx, 1 << 5 | 1 << 8);
    assert_eq!(
        template.apply(&host).unwrap_err().to_string(),
        "this host's processors lack avx2, bmi2 of the CPU template x86-64-v3; start it with a lower \
         cpu_template (host takes what there is), or on another host"
    );
    CpuTemplate::X86_64V2.apply(&host).unwrap();
    let narrow = without(&bare(template), 0x8000_0008, Eax, 1);
    let error = template.apply(&narrow).unwrap_err().to_string();
    assert!(error.contains("39 bits of physical addresses"), "{error}");
    assert!(
        CpuTemplate::X86_64V2
            .apply(&CpuId::from_entries(&[]).unwrap())
            .is_err()
    );
}

#[test]
fn without_a_template_nothing_is_changed() {
    let host = with(&everything(), 0x4000_0001, Eax, 0x1234);
    let shown = CpuTemplate::Host.apply(&host).unwrap();
    assert_eq!(shown.as_slice(), host.as_slice());
    CpuTemplate::Host
        .check(&CpuId::from_entries(&[]).unwrap())
        .unwrap();
}

#[test]
fn no_bit_is_in_the_table_twice() {
    let mut seen = Vec::new();
    for features in FEATURES {
        for (bit, name) in features.bits {
            let at = (
                features.leaf,
                features.index,
                format!("{:?}", features.register),
                bit,
            );
            assert!(!seen.contains(&at), "{name}");
            seen.push(at);
        }
    }
}

#[test]
fn a_guest_is_not_shown_that_it_could_have_guests_and_nothing_else_is_hidden() {
    let entry = |function, ecx| kvm_cpuid_entry2 {
        function,
        ecx,
        eax: 1,
        edx: u32::MAX,
        ..Default::default()
    };
    let all = [
        entry(1, u32::MAX),
        entry(7, u32::MAX),
        entry(0x8000_0001, u32::MAX),
        entry(0x8000_000a, 0),
    ];
    let mut shown = CpuId::from_entries(&all).unwrap();
    hide_nesting(&mut shown);
    let [one, seven, extended, svm] = shown.as_slice() else {
        panic!()
    };
    assert_eq!(one.ecx, !(1 << 5));
    assert_eq!(*seven, all[1]);
    assert_eq!((extended.ecx, extended.edx), (!(1 << 2), u32::MAX));
    assert_eq!((svm.eax, svm.edx), (0, 0));
}
