use super::*;
use crate::rotation::ShareSeen;

const STORE: StoreId = StoreId([7; 16]);
const NEW: KekId = KekId([2; 16]);
const OLD: KekId = KekId([1; 16]);

/// The report of a share that is done: three files, of nine.
fn done(shard: &str) -> Report {
    let counts = Counts { scanned: 3, current: 3, ..Counts::default() };
    Report {
        outcome: Outcome::ShareComplete,
        started: 100,
        finished: 200,
        passes: 2,
        sweep: Counts { scanned: 3, rewrapped: 3, ..Counts::default() },
        verify: Some(counts),
        slots_by_kek: [(NEW, 6)].into(),
        headers_by_kek: [(NEW, 3)].into(),
        shares: vec![ShareSeen {
            shard: shard.parse().unwrap(),
            began: 150,
            ended: 200,
            listed: 9,
            own: 3,
            inodes: "00000000deadbeef".into(),
        }],
        ..sum(&[], STORE, NEW)
    }
}

fn three() -> Vec<Report> {
    ["1/3", "2/3", "3/3"].map(done).into()
}

fn missing(reports: &[Report]) -> Vec<(String, Why)> {
    judge(reports, STORE, NEW).unwrap_err().into_iter().map(|(s, w)| (s.to_string(), w)).collect()
}

#[test]
fn all_shares_together_are_one_report() {
    let reports = three();
    let whole = judge(&reports, STORE, NEW).unwrap();
    let all = sum(&whole, STORE, NEW);
    assert_eq!((all.outcome, all.started, all.passes, all.shares.len()), (Outcome::Complete, 100, 6, 3));
    assert_eq!((all.sweep.rewrapped, all.verify.unwrap().current), (9, 9));
    assert_eq!((all.slots_by_kek[&NEW], all.headers_by_kek[&NEW]), (18, 9));
    // What has content and no header spoils no share, and is told of the whole.
    let mut odd = reports.clone();
    for (r, path) in odd.iter_mut().zip(["a", "b"]) {
        r.verify = Some(Counts { scanned: 3, current: 2, no_header: 1, ..Counts::default() });
        r.no_header = vec![path.into()];
    }
    let all = sum(&judge(&odd, STORE, NEW).unwrap(), STORE, NEW);
    assert_eq!((all.verify.unwrap().no_header, &all.no_header[..]), (2, &["a".to_owned(), "b".to_owned()][..]));
    // Order and copies do not matter.
    let mut many = reports.clone();
    many.reverse();
    many.push(done("2/3"));
    assert_eq!(judge(&many, STORE, NEW).unwrap().len(), 3);
}

#[test]
fn every_missing_share_is_named() {
    assert_eq!(missing(&[]), []);
    let mut r = three();
    r.remove(1);
    assert_eq!(missing(&r), [("2/3".into(), Why::NoReport)]);
    assert_eq!(missing(&r[..1]), [("2/3".into(), Why::NoReport), ("3/3".into(), Why::NoReport)]);
}

/// Each of these spoils one share and nothing else.
#[test]
fn a_share_counts_only_if_its_report_says_what_is_needed() {
    type Spoil = fn(&mut Report);
    let cases: [(Spoil, Why); 11] = [
        (|r| r.target = OLD, Why::OtherRun(OLD)),
        (|r| r.outcome = Outcome::Cancelled, Why::NotDone(Outcome::Cancelled, 0)),
        (|r| r.outcome = Outcome::Incomplete, Why::NotDone(Outcome::Incomplete, 0)),
        (|r| r.failures_total = 4, Why::NotDone(Outcome::ShareComplete, 4)),
        (|r| r.waived.push(none_at_all()), Why::Waived(1)),
        (|r| r.verify.as_mut().unwrap().vanished = 2, Why::Vanished(2)),
        (|r| r.verify = None, Why::NotDone(Outcome::ShareComplete, 0)),
        (|r| r.slots_by_kek.extend([(OLD, 1)]), Why::NotDone(Outcome::ShareComplete, 0)),
        (|r| r.shares[0].listed = 10, Why::OtherFiles),
        (|r| r.shares[0].inodes = "00000000deadbeee".into(), Why::OtherFiles),
        (|r| r.store = StoreId([8; 16]), Why::NoReport),
    ];
    for (spoil, why) in cases {
        let mut reports = three();
        spoil(&mut reports[2]);
        assert_eq!(missing(&reports), [("3/3".to_owned(), why)]);
    }
    let mut reports = three();
    reports[2].shares[0].own = 2;
    assert_eq!(missing(&reports), [("1/3".into(), Why::Sum)]);
    // A whole run's report is no share's, nor is a merged one.
    let whole = Report { shares: Vec::new(), outcome: Outcome::Complete, ..done("3/3") };
    let merged = Report { shares: three().into_iter().flat_map(|r| r.shares).collect(), ..done("3/3") };
    let mut reports = three();
    reports[2] = whole;
    assert_eq!(missing(&reports), [("3/3".into(), Why::NoReport)]);
    reports[2] = merged;
    assert_eq!(missing(&reports), [("3/3".into(), Why::NoReport)]);
}

#[test]
fn the_latest_word_of_a_share_counts_and_another_rotations_word_never() {
    let mut reports = three();
    reports.push(Report { outcome: Outcome::Incomplete, failures_total: 1, finished: 201, ..done("2/3") });
    assert_eq!(missing(&reports), [("2/3".into(), Why::NotDone(Outcome::Incomplete, 1))]);
    reports.push(Report { finished: 202, ..done("2/3") });
    assert!(judge(&reports, STORE, NEW).is_ok());
    // By a clock that is ahead.
    reports.push(Report { target: OLD, finished: 999, ..done("2/3") });
    assert!(judge(&reports, STORE, NEW).is_ok());
}

#[test]
fn a_division_that_was_given_up_does_not_stand_in_the_way() {
    let mut reports = three();
    reports.extend(["1/2", "4/5"].map(done));
    assert_eq!(judge(&reports, STORE, NEW).unwrap().len(), 3);
    // And if none is whole, the one that is nearest is told.
    reports.remove(0);
    assert_eq!(missing(&reports), [("2/2".into(), Why::NoReport)]);
}

#[test]
fn what_is_missing_says_what_to_run() {
    let shard = "2/3".parse().unwrap();
    let f = failure(shard, &Why::NoReport, Some(0));
    assert_eq!((f.path.as_str(), f.code.as_str()), ("share 2/3", "share-missing"));
    assert_eq!(f.message, "no report of it; last heard 1970-01-01T00:00:00Z; run rotate --shard 2/3");
    assert!(failure(shard, &Why::NoReport, None).message.contains("never heard of"));
}
