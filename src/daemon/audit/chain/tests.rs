use super::*;
use crate::crypto::secret::StoreSecret;
use crate::daemon::audit::line::seal_key;
use proptest::prelude::*;

const STORE: StoreId = StoreId([0x5a; 16]);

struct Log {
    chain: Chain,
    bytes: Vec<u8>,
    key: SealKey,
}

impl Log {
    fn new() -> Self {
        let mut l = Self { chain: Chain::EMPTY, bytes: Vec::new(), key: seal_key(&StoreSecret::random()) };
        l.add(STARTED);
        l
    }

    fn line(&mut self, line: &[u8]) {
        self.bytes.extend_from_slice(line);
        self.bytes.push(b'\n');
    }

    fn add(&mut self, event: &'static str) {
        let fields = Fields { result: Some("ok".into()), pid: Some(7), ..Fields::default() };
        let line = self.chain.append(&Event::now(event, fields), STORE, None);
        self.line(&line);
    }

    fn seal(&mut self) {
        let line = self.chain.append(&Event::now(SEAL, Fields::default()), STORE, Some(&self.key));
        self.line(&line);
    }

    fn example() -> Self {
        let mut l = Self::new();
        for e in ["mount", "unwrap", "wrap"] {
            l.add(e);
        }
        l.seal();
        l.add("unmount");
        l.seal();
        l
    }

    fn verify(&self, bytes: &[u8]) -> Result<Summary, Bad> {
        let s = chain_of(&[bytes])?;
        match s.seals.iter().find(|s| !self.key.is_genuine(&s.seal)) {
            Some(s) => Err(Bad { line: s.line, why: Why::SealForged }),
            None => Ok(s),
        }
    }
}

fn feed(v: &mut Verifier, bytes: &[u8]) -> Result<(), Bad> {
    v.begin_file()?;
    let mut rest = bytes;
    while !rest.is_empty() {
        match rest.iter().position(|b| *b == b'\n') {
            Some(i) => {
                v.line(&rest[..i], true)?;
                rest = &rest[i + 1..];
            }
            None => {
                v.line(rest, false)?;
                rest = b"";
            }
        }
    }
    Ok(())
}

fn chain_of(files: &[&[u8]]) -> Result<Summary, Bad> {
    let mut v = Verifier::new(None);
    files.iter().try_for_each(|f| feed(&mut v, f))?;
    v.end()
}

#[test]
fn a_whole_log_is_whole() {
    let l = Log::example();
    let s = l.verify(&l.bytes).unwrap();
    assert_eq!((s.records, s.end, s.beginning, s.chains), (7, l.chain, Beginning::Start, 1));
    assert_eq!((s.unsealed, s.recovered, s.lost, s.store), (0, 0, 0, STORE));
    assert_eq!(s.seals.iter().map(|s| (s.line, s.seq)).collect::<Vec<_>>(), [(5, 5), (7, 7)]);
}

#[test]
fn every_flipped_bit_is_noticed() {
    let l = Log::example();
    for i in 0..l.bytes.len() {
        for bit in 0..8 {
            let mut bad = l.bytes.clone();
            bad[i] ^= 1 << bit;
            assert!(l.verify(&bad).is_err(), "byte {i} bit {bit}: {}", String::from_utf8_lossy(&bad));
        }
    }
}

#[test]
fn without_the_key_all_but_the_last_line_is_bound() {
    let l = Log::example();
    let last = l.bytes[..l.bytes.len() - 1].iter().rposition(|b| *b == b'\n').unwrap();
    for i in 0..=last {
        let mut bad = l.bytes.clone();
        bad[i] ^= 1;
        assert!(chain_of(&[&bad]).is_err(), "byte {i}");
    }
}

fn lines(bytes: &[u8]) -> Vec<Vec<u8>> {
    bytes.split_inclusive(|b| *b == b'\n').map(<[u8]>::to_vec).collect()
}

#[test]
fn lines_removed_put_in_doubled_and_swapped_are_noticed() {
    let l = Log::example();
    let all = lines(&l.bytes);
    let n = all.len();
    for i in 0..n {
        let mut less = all.clone();
        less.remove(i);
        let r = l.verify(&less.concat());
        if i == n - 1 {
            assert_eq!(r.unwrap().end.seq, 6, "cut off at the end: whole, but shorter");
        } else {
            assert!(r.is_err(), "line {i} removed");
        }
        let mut twice = all.clone();
        twice.insert(i, all[i].clone());
        assert!(l.verify(&twice.concat()).is_err(), "line {i} doubled");
        for j in 0..n {
            let mut swapped = all.clone();
            swapped.swap(i, j);
            assert_eq!(l.verify(&swapped.concat()).is_err(), i != j, "{i} and {j}");
        }
        for strange in [&b"\n"[..], b"x\n", b"{}\n", &all[0]] {
            let mut more = all.clone();
            more.insert(i + 1, strange.to_vec());
            assert!(l.verify(&more.concat()).is_err(), "after line {i}");
        }
    }
}

#[test]
fn a_cut_is_noticed_inside_a_line_and_by_its_head_at_the_end_of_one() {
    let l = Log::example();
    for n in 0..l.bytes.len() {
        let cut = &l.bytes[..n];
        match l.verify(cut) {
            Err(_) => assert!(n == 0 || cut.last() != Some(&b'\n')),
            Ok(s) => {
                assert_eq!(cut.last(), Some(&b'\n'));
                assert_ne!(s.end, l.chain, "whoever knows the head sees that it is another");
            }
        }
    }
}

#[test]
fn a_history_rewritten_without_the_key_fails_at_the_first_seal() {
    let l = Log::example();
    let mut forged = Log { chain: Chain::EMPTY, bytes: Vec::new(), key: seal_key(&StoreSecret::random()) };
    for e in [STARTED, "mount", "wrap", "wrap"] {
        forged.add(e);
    }
    forged.seal();
    assert!(chain_of(&[&forged.bytes]).is_ok(), "the chain alone proves nothing against who can write it anew");
    assert_eq!(l.verify(&forged.bytes), Err(Bad { line: 5, why: Why::SealForged }));
    // The old seals do not fit a new history either.
    let old: Vec<Vec<u8>> = lines(&l.bytes);
    let mut mixed = lines(&forged.bytes);
    mixed[4] = old[4].clone();
    assert_eq!(l.verify(&mixed.concat()), Err(Bad { line: 5, why: Why::Broken }));
}

#[test]
fn what_is_wrong_is_said_of_the_right_line() {
    let l = Log::example();
    let all = lines(&l.bytes);
    let bad = |lines: &[Vec<u8>]| l.verify(&lines.concat()).unwrap_err();
    assert_eq!(bad(&all[1..]), Bad { line: 1, why: Why::Beginning });
    assert_eq!(bad(&[]), Bad { line: 1, why: Why::NotARecord });
    let mut m = all.clone();
    m.remove(2);
    assert_eq!(bad(&m), Bad { line: 3, why: Why::Broken });
    m[1] = b"nonsense\n".to_vec();
    assert_eq!(bad(&m), Bad { line: 2, why: Why::NotARecord });
    assert_eq!(bad(&[&all[..], &all[..1]].concat()), Bad { line: 8, why: Why::BeginsAgain });
    let mut other = Verifier::new(Some(StoreId([1; 16])));
    feed(&mut other, &l.bytes).unwrap();
    assert_eq!(other.end().unwrap_err(), Bad { line: 1, why: Why::OtherStore });
    let mut open = l.bytes.clone();
    open.pop();
    assert_eq!(l.verify(&open), Err(Bad { line: 7, why: Why::NotWhole }));
    let no_number = String::from_utf8(l.bytes.clone()).unwrap().replacen("\"seq\":2", "\"seq\":3", 1);
    assert_eq!(chain_of(&[no_number.as_bytes()]), Err(Bad { line: 2, why: Why::Number }));
    let bare = Log { chain: Chain::EMPTY, bytes: Vec::new(), key: seal_key(&StoreSecret::random()) };
    let mut bare = bare;
    bare.add(STARTED);
    bare.add(SEAL);
    assert_eq!(bare.verify(&bare.bytes), Err(Bad { line: 2, why: Why::SealShape }));
}

#[test]
fn files_continue_each_other_in_their_order_only() {
    let mut l = Log::example();
    let first = std::mem::take(&mut l.bytes);
    let before = l.chain;
    l.add(CONTINUED);
    l.add("unwrap");
    let second = std::mem::take(&mut l.bytes);
    l.add(CONTINUED);
    l.seal();
    let third = std::mem::take(&mut l.bytes);
    let s = chain_of(&[&first, &second, &third]).unwrap();
    assert_eq!((s.records, s.end, s.chains, s.beginning), (11, l.chain, 1, Beginning::Start));
    let s = chain_of(&[&second, &third]).unwrap();
    assert_eq!(s.beginning, Beginning::After(before));
    assert_eq!(chain_of(&[&first, &third]), Err(Bad { line: 1, why: Why::NotContinued }));
    assert!(chain_of(&[&second, &first, &third]).is_err());
    assert!(chain_of(&[&[&first[..], &second].concat()]).is_err(), "a beginning in the middle of a file");
    // A log that begins anew after one that ended is another chain, which is said.
    let anew = Log::example();
    let s = chain_of(&[&first, &anew.bytes]).unwrap();
    assert_eq!((s.chains, s.end), (2, anew.chain));
}

#[test]
fn a_torn_line_is_accounted_for_wherever_the_crash_came() {
    let l = Log::example();
    let start = l.bytes[..l.bytes.len() - 1].iter().rposition(|b| *b == b'\n').unwrap() + 1;
    let first_ends = l.bytes.iter().position(|b| *b == b'\n').unwrap() + 1;
    for n in (0..first_ends).chain(start..l.bytes.len()) {
        let mut file = l.bytes[..n].to_vec();
        let t = tail(&file, true).unwrap();
        assert_eq!(t.unfinished, !file.is_empty() && file.last() != Some(&b'\n'));
        let mut again = Log { chain: t.chain, bytes: Vec::new(), key: seal_key(&StoreSecret::random()) };
        if t.unfinished {
            file.push(b'\n');
        }
        if let Some(torn) = &t.torn {
            let line = again.chain.recover(torn, STORE);
            again.line(&line);
        }
        again.add(if t.chain == Chain::EMPTY && t.torn.is_none() { STARTED } else { "opened" });
        file.extend_from_slice(&again.bytes);
        let s = chain_of(&[&file]).unwrap_or_else(|e| panic!("cut at {n}: {e}\n{}", String::from_utf8_lossy(&file)));
        assert_eq!((s.recovered, s.end), (u64::from(t.torn.is_some()), again.chain), "cut at {n}");
        // Nothing else passes for a torn line.
        if t.torn.is_some() {
            for i in n.saturating_sub(3)..file.len() - 1 {
                let mut bad = file.clone();
                bad[i] ^= 1;
                let noticed = chain_of(&[&bad]).is_err();
                let last = file[..file.len() - 1].iter().rposition(|b| *b == b'\n').unwrap();
                assert!(noticed || i > last, "cut at {n}, byte {i}");
            }
        }
    }
}

#[test]
fn only_a_torn_line_may_be_accounted_for() {
    let mut l = Log::example();
    let torn = Torn::of(b"{\"time\":");
    let chain = l.chain;
    let line = l.chain.recover(&torn, STORE);
    l.line(&line);
    assert_eq!(chain_of(&[&l.bytes]), Err(Bad { line: 8, why: Why::NothingTorn }));
    // One that lies about what was torn, or where.
    for (prev, after, len) in [(0u8, 0u8, 0u64), (1, 0, 0), (0, 1, 0), (0, 0, 1)] {
        let mut file = Log::example().bytes;
        let end = chain_of(&[&file]).unwrap().end;
        file.extend_from_slice(b"{\"time\":\n");
        let mut at = Chain { seq: end.seq, head: end.head.map(|b| b ^ after) };
        let t = Torn { hash: torn.hash.map(|b| b ^ prev), len: torn.len + len };
        file.extend_from_slice(&at.recover(&t, STORE));
        file.push(b'\n');
        let honest = (prev, after, len) == (0, 0, 0);
        assert_eq!(chain_of(&[&file]).is_ok(), honest);
    }
    assert_ne!(chain, l.chain);
}

#[test]
fn what_is_no_log_is_not_appended_to() {
    assert_eq!(tail(b"", true).unwrap().chain, Chain::EMPTY);
    for other in [&b"hello\n"[..], b"hello", b"\n", b"{}\n", b"{\"time\": 5}\n", b"[defaults]\nlog_level = \"info\"\n"]
    {
        assert_eq!(tail(other, true), Err(NotALog::NoRecord));
    }
    assert_eq!(tail(b"xyz", false), Err(NotALog::TooLong));
    let l = Log::example();
    let last = l.bytes[..l.bytes.len() - 1].iter().rposition(|b| *b == b'\n').unwrap();
    assert_eq!(tail(&l.bytes[last..], false).unwrap().chain, l.chain);
    assert_eq!(tail(&l.bytes[last + 1..], false), Err(NotALog::TooLong), "where the line begins is not known");
    // Two crashes, the first of them after a few bytes of the first record.
    let twice = b"{\n{\"time\":\"20";
    assert_eq!(tail(twice, true).unwrap().torn, Some(Torn::of(twice)));
    // Zeros, as a power cut can leave them.
    let mut zeros = l.bytes.clone();
    zeros.extend_from_slice(&[0; 5000]);
    assert_eq!(tail(&zeros, true).unwrap().torn, Some(Torn::of(&[0; 5000])));
}

proptest! {
    /// Any file at all is judged without a panic, and nothing that is not a chain passes for one.
    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = tail(&bytes, true);
        let _ = tail(&bytes, false);
        prop_assert!(chain_of(&[&bytes]).is_err());
    }

    /// A log that was edited anywhere before its last line, in any way, is whole only if the edit changed nothing.
    #[test]
    fn any_edit(at in 0usize..1200, remove in 0usize..40, put in proptest::collection::vec(any::<u8>(), 0..40)) {
        let l = Log::example();
        let at = at.min(l.bytes.len());
        let mut edited = l.bytes[..at].to_vec();
        edited.extend_from_slice(&put);
        edited.extend_from_slice(&l.bytes[(at + remove).min(l.bytes.len())..]);
        if let Ok(s) = l.verify(&edited) {
            prop_assert!(edited == l.bytes || s.end != l.chain, "at {}", at);
            prop_assert!(l.bytes.starts_with(&edited));
        }
    }

    /// Crashes anywhere, any number of them: the log that is left verifies, and holds every line that was whole.
    #[test]
    fn any_crashes(cuts in proptest::collection::vec((1usize..6, 0usize..400), 1..6)) {
        let mut file = Vec::new();
        for (records, cut) in cuts {
            let t = tail(&file, true).unwrap();
            let mut l = Log { chain: t.chain, bytes: Vec::new(), key: seal_key(&StoreSecret::random()) };
            if t.unfinished {
                l.bytes.push(b'\n');
            }
            if let Some(torn) = &t.torn {
                let line = l.chain.recover(torn, STORE);
                l.line(&line);
            } else if t.chain == Chain::EMPTY {
                l.add(STARTED);
            }
            for _ in 0..records {
                l.add("unwrap");
            }
            // The crash takes some of what was written since the last one.
            let keep = l.bytes.len().saturating_sub(cut);
            file.extend_from_slice(&l.bytes[..keep]);
        }
        let t = tail(&file, true).unwrap();
        let mut l = Log { chain: t.chain, bytes: Vec::new(), key: seal_key(&StoreSecret::random()) };
        if t.unfinished {
            l.bytes.push(b'\n');
        }
        if let Some(torn) = &t.torn {
            let line = l.chain.recover(torn, STORE);
            l.line(&line);
        }
        if t.chain == Chain::EMPTY && t.torn.is_none() {
            l.add(STARTED);
        }
        l.seal();
        file.extend_from_slice(&l.bytes);
        let s = chain_of(&[&file]);
        prop_assert!(s.is_ok(), "{:?}\n{}", s, String::from_utf8_lossy(&file));
        prop_assert_eq!(s.unwrap().end, l.chain);
    }
}
