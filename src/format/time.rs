//! Times as they are written: RFC 3339, UTC.

use std::time::{SystemTime, UNIX_EPOCH};

/// `2026-11-24T16:51:59.123Z`. A time before 1970 is shown as its beginning.
pub fn rfc3339(t: SystemTime) -> String {
    let since = t.duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}.{:03}Z", to_the_second(since.as_secs()), since.subsec_millis())
}

/// `2026-11-24T16:51:59Z`, of a time in Unix seconds.
pub fn rfc3339_seconds(unix: u64) -> String {
    to_the_second(unix) + "Z"
}

fn to_the_second(unix: u64) -> String {
    let (days, second) = (unix / 86_400, unix % 86_400);
    let (year, month, day) = civil(days);
    let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}")
}

/// The Gregorian date `days` after 1970-01-01. Counts in 400-year eras that begin on 1 March, so that the leap day is a
/// year's last.
fn civil(days: u64) -> (u64, u64, u64) {
    const ERA: u64 = 146_097;
    // 0000-03-01 lies so many days before 1970-01-01.
    let days = days + 719_468;
    let (era, of_era) = (days / ERA, days % ERA);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_are_gregorian() {
        // As `date -u -d @N +%FT%T` says.
        for (seconds, shown) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
            (1_790_000_000, "2026-09-21T14:13:20.000Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), shown);
        }
        assert!(rfc3339(UNIX_EPOCH + Duration::from_millis(1_007)).ends_with(":01.007Z"));
        assert_eq!(rfc3339(UNIX_EPOCH - Duration::from_secs(5)), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339_seconds(1_790_000_000), "2026-09-21T14:13:20Z");
        assert!(rfc3339_seconds(u64::MAX).ends_with('Z'), "a keyring may claim any time");
    }

    #[test]
    fn every_day_of_four_centuries_follows_the_one_before() {
        let mut before = civil(0);
        for n in 1..146_097 {
            let now = civil(n);
            let (y, m, d) = before;
            let next = [(y, m, d + 1), (y, m + 1, 1), (y + 1, 1, 1)];
            assert!(next.contains(&now), "{before:?} {now:?}");
            let leap = y % 4 == 0 && (y % 100 != 0 || y % 400 == 0);
            let length = [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
            assert_eq!(now.2 == 1, d == length[m as usize - 1], "{before:?}");
            before = now;
        }
    }
}
