//! As much of HTTP/1.1 (RFC 9112) as a scraper needs: one request on a connection, then its end. Pure.

/// Longest request, head and all, in bytes.
pub const REQUEST_MAX: usize = 8 << 10;
/// What the text is.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a request gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Its head is not complete.
    More,
    /// The metrics.
    Metrics,
    /// An error: status and reason.
    Refuse(u16, &'static str),
}

/// Judges what has come of a request so far.
pub fn judge(bytes: &[u8]) -> Verdict {
    let ends = bytes.windows(4).position(|w| w == b"\r\n\r\n");
    match ends {
        None if bytes.len() >= REQUEST_MAX => Verdict::Refuse(431, "Request Header Fields Too Large"),
        // A line that can be no request's need not be waited for.
        None if bytes.contains(&0) => Verdict::Refuse(400, "Bad Request"),
        None => Verdict::More,
        Some(_) => of_head(bytes),
    }
}

fn of_head(bytes: &[u8]) -> Verdict {
    let line = bytes.split(|b| *b == b'\r').next().unwrap_or_default();
    let Ok(line) = std::str::from_utf8(line) else { return Verdict::Refuse(400, "Bad Request") };
    let mut words = line.split(' ');
    match (words.next(), words.next(), words.next(), words.next()) {
        (Some(method), Some(target), Some("HTTP/1.1" | "HTTP/1.0"), None) => {
            let path = target.split('?').next().unwrap_or_default();
            match (method, path) {
                ("GET", "/metrics") => Verdict::Metrics,
                ("GET", _) => Verdict::Refuse(404, "Not Found"),
                _ => Verdict::Refuse(405, "Method Not Allowed"),
            }
        }
        _ => Verdict::Refuse(400, "Bad Request"),
    }
}

/// The answer with `body`, or with `refuse`.
pub fn answer(refuse: Option<(u16, &str)>, body: &str) -> String {
    let (status, reason) = refuse.unwrap_or((200, "OK"));
    let allow = if status == 405 { "Allow: GET\r\n" } else { "" };
    let body = if refuse.is_some() { format!("{reason}; the metrics are at /metrics\n") } else { body.to_owned() };
    format!(
        "HTTP/1.1 {status} {reason}\r\nContent-Type: {TEXT}\r\n{allow}Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_judged() {
        for (request, verdict) in [
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", Verdict::Metrics),
            ("GET /metrics?a=b HTTP/1.0\r\n\r\n", Verdict::Metrics),
            ("GET / HTTP/1.1\r\n\r\n", Verdict::Refuse(404, "Not Found")),
            ("POST /metrics HTTP/1.1\r\n\r\n", Verdict::Refuse(405, "Method Not Allowed")),
            ("GET /metrics HTTP/2.0\r\n\r\n", Verdict::Refuse(400, "Bad Request")),
            ("GET /metrics\r\n\r\n", Verdict::Refuse(400, "Bad Request")),
            ("GET  /metrics HTTP/1.1\r\n\r\n", Verdict::Refuse(400, "Bad Request")),
            ("\r\n\r\n", Verdict::Refuse(400, "Bad Request")),
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n", Verdict::More),
            ("", Verdict::More),
            ("\0", Verdict::Refuse(400, "Bad Request")),
        ] {
            assert_eq!(judge(request.as_bytes()), verdict, "{request:?}");
        }
        assert_eq!(judge(&[b'a'; REQUEST_MAX]), Verdict::Refuse(431, "Request Header Fields Too Large"));
        assert_eq!(judge(b"\xff\xff / HTTP/1.1\r\n\r\n"), Verdict::Refuse(400, "Bad Request"));
    }

    #[test]
    fn answers_have_their_length() {
        let ok = answer(None, "a 1\n");
        assert!(ok.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4"));
        assert!(ok.ends_with("Content-Length: 4\r\nConnection: close\r\n\r\na 1\n"));
        assert!(answer(Some((405, "Method Not Allowed")), "").contains("\r\nAllow: GET\r\n"));
    }
}
