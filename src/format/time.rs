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

/// Reads a date (its beginning, UTC) or a date and time with `Z` or an offset: seconds since the epoch, and nanoseconds.
/// `None` if it is neither, or no date of the calendar.
pub fn parse_rfc3339(text: &str) -> Option<(i64, u32)> {
    let number = |s: &str, digits: usize| {
        (s.len() == digits && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse::<u64>().ok()).flatten()
    };
    let (date, time) = match text.split_once(['T', 't', ' ']) {
        Some((d, t)) => (d, Some(t)),
        None => (text, None),
    };
    let mut parts = date.split('-');
    let (y, m, d) = (number(parts.next()?, 4)?, number(parts.next()?, 2)?, number(parts.next()?, 2)?);
    let days = days_to(y, m, d).filter(|_| parts.next().is_none())?;
    let Some(time) = time else { return Some((days * 86_400, 0)) };
    let (clock, offset) = match (time.strip_suffix(['Z', 'z']), time.rfind(['+', '-'])) {
        (Some(clock), _) => (clock, 0),
        (None, at) => {
            let (clock, zone) = time.split_at_checked(at?)?;
            let (h, m) = zone.get(1..)?.split_once(':')?;
            let (h, m) = (number(h, 2).filter(|h| *h < 24)?, number(m, 2).filter(|m| *m < 60)?);
            let seconds = i64::try_from(h * 3600 + m * 60).ok()?;
            (clock, if zone.starts_with('-') { -seconds } else { seconds })
        }
    };
    let (clock, fraction) = clock.split_once('.').map_or((clock, None), |(c, f)| (c, Some(f)));
    let mut parts = clock.split(':');
    let (h, m, s) = (number(parts.next()?, 2)?, number(parts.next()?, 2)?, number(parts.next()?, 2)?);
    if parts.next().is_some() || h > 23 || m > 59 || s > 59 {
        return None;
    }
    let nanos = match fraction {
        None => 0,
        Some(f) => {
            u32::try_from(number(f, f.len()).filter(|_| (1..=9).contains(&f.len()))?).ok()?
                * 10u32.pow(9 - u32::try_from(f.len()).ok()?)
        }
    };
    Some((days * 86_400 + i64::try_from(h * 3600 + m * 60 + s).ok()? - offset, nanos))
}

/// Days from 1970-01-01 to a date of the calendar. Reverses [`civil`].
fn days_to(year: u64, month: u64, day: u64) -> Option<i64> {
    if !(1..=12).contains(&month) || day == 0 {
        return None;
    }
    let year_from_march = i64::try_from(year).ok()? - i64::from(month <= 2);
    let (era, of_era) = (year_from_march.div_euclid(400), year_from_march.rem_euclid(400));
    let from_march = i64::try_from((month + 9) % 12).ok()?;
    let of_year = (153 * from_march + 2) / 5 + i64::try_from(day).ok()? - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    // A day that the month does not have is another month's; before 1970 the shift by whole eras keeps that true.
    let (_, m, d) = civil(u64::try_from(days + 5 * 146_097).ok()?);
    ((m, d) == (month, day)).then_some(days)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_is_written_is_read_again() {
        for days in (0..60_000u64).step_by(11).chain([11_015, 11_016, 11_017]) {
            let unix = days * 86_400 + days % 86_400;
            let shown = rfc3339_seconds(unix);
            assert_eq!(parse_rfc3339(&shown), Some((unix as i64, 0)), "{shown}");
            assert_eq!(parse_rfc3339(&shown[..10]), Some((days as i64 * 86_400 + (days / 86_400 * 86_400) as i64, 0)));
        }
        let at = |t| parse_rfc3339(t);
        assert_eq!(at("1970-01-01T00:00:00.5Z"), Some((0, 500_000_000)));
        assert_eq!(at("1970-01-01 01:30:00+01:30"), Some((0, 0)));
        assert_eq!(at("1969-12-31t19:00:00.000000001-05:00"), Some((0, 1)));
        assert_eq!(at("1969-12-31"), Some((-86_400, 0)));
        for bad in [
            "",
            "2026",
            "2026-1-01",
            "2026-02-30",
            "2025-02-29",
            "2026-13-01",
            "2026-00-10",
            "2026-01-00",
            "2026-01-01T",
            "2026-01-01T00:00Z",
            "2026-01-01T00:00:00",
            "2026-01-01T24:00:00Z",
            "2026-01-01T00:00:00.Z",
            "2026-01-01T00:00:00+1:00",
            "2026-01-01-01",
            "+026-01-01",
            "2026-01-01T00:00:00.1234567890Z",
        ] {
            assert_eq!(at(bad), None, "{bad}");
        }
    }

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
