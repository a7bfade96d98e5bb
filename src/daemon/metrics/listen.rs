//! The port: loopback only, a few clients at a time, each for a few seconds.

use super::http::{REQUEST_MAX, Verdict, answer, judge};
use crate::daemon::accept::{Socket, serve_all};
use crate::daemon::fault::{Fault, FaultKind, plain};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

const SOCKET: Socket = Socket { name: "metrics", most: 8 };
/// How long a client may take for its request, and to take the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where to listen, as users say it: `127.0.0.1:9464`, `[::1]:9464`, `localhost:9464`.
///
/// # Errors
/// [`FaultKind::Usage`] if it is no address and port, or not of this machine alone.
pub fn address(text: &str) -> Result<SocketAddr, Fault> {
    let usage = |why: &str| Fault::new(FaultKind::Usage, format!("metrics address {text}: {why}"));
    let named = text.strip_prefix("localhost:").map(|port| format!("{}:{port}", Ipv4Addr::LOCALHOST));
    let at: SocketAddr = named
        .as_deref()
        .unwrap_or(text)
        .parse()
        .map_err(|_| usage("expected an address and a port, such as 127.0.0.1:9464"))?;
    if !is_loopback(at.ip()) {
        return Err(usage(
            "metrics are served on loopback addresses only; to have them elsewhere, put a proxy that knows its clients \
             before 127.0.0.1",
        ));
    }
    Ok(at)
}

fn is_loopback(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(a) => a.is_loopback(),
        // 127.0.0.1 written as IPv6 is left out: it is a socket of both families.
        IpAddr::V6(a) => a == Ipv6Addr::LOCALHOST,
    }
}

/// Listens at `at` and answers with what `page` says, in threads of its own, until the process ends. Returns where, which
/// has a number also if port 0 was asked for.
///
/// # Errors
/// The kernel's.
pub fn start(at: SocketAddr, page: impl Fn() -> String + Send + Sync + 'static) -> Result<SocketAddr, Fault> {
    let fail = |e: io::Error| Fault::new(FaultKind::Other, format!("cannot serve metrics at {at}: {}", plain(&e)));
    let listener = TcpListener::bind(at).map_err(fail)?;
    let bound = listener.local_addr().map_err(fail)?;
    let next = move || listener.accept().map(|(stream, _)| stream);
    let accept = move || serve_all(SOCKET, next, move |stream| serve(stream, &page));
    std::thread::Builder::new().name(SOCKET.name.into()).spawn(accept).map_err(fail)?;
    Ok(bound)
}

fn serve(mut stream: TcpStream, page: &impl Fn() -> String) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut request = Vec::new();
    let text = loop {
        match judge(&request) {
            Verdict::Metrics => break answer(None, &page()),
            Verdict::Refuse(status, reason) => break answer(Some((status, reason)), ""),
            Verdict::More => {}
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let mut piece = [0; 1024];
        let room = piece.len().min(REQUEST_MAX - request.len());
        let n = stream.read(piece.get_mut(..room).unwrap_or_default())?;
        if n == 0 {
            return Ok(());
        }
        request.extend_from_slice(piece.get(..n).unwrap_or_default());
    };
    stream.write_all(text.as_bytes())?;
    // What was not read would make the kernel throw the answer away.
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mut rest = [0; 1024];
    while matches!(stream.read(&mut rest), Ok(n) if n > 0) && Instant::now() < end {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_addresses_are_taken() {
        for good in ["127.0.0.1:9464", "127.9.9.9:1", "[::1]:9464", "localhost:80", "127.0.0.1:0"] {
            assert!(address(good).unwrap().ip().is_loopback(), "{good}");
        }
        for bad in ["0.0.0.0:9464", "[::]:9464", "192.168.1.1:9464", "[fe80::1]:9464", "[::ffff:127.0.0.1]:9464"] {
            let e = address(bad).unwrap_err();
            assert!(e.kind == FaultKind::Usage && e.message.contains("loopback"), "{bad}: {e}");
        }
        for bad in ["", "9464", "127.0.0.1", "example.org:9464", "127.0.0.1:99999", "localhost"] {
            assert!(address(bad).unwrap_err().message.contains("such as 127.0.0.1:9464"), "{bad}");
        }
    }

    fn asked(at: SocketAddr, request: &[u8]) -> String {
        let mut s = TcpStream::connect(at).unwrap();
        let _ = s.write_all(request);
        let mut text = String::new();
        let _ = s.read_to_string(&mut text);
        text
    }

    #[test]
    fn a_scraper_gets_the_page_and_others_are_told_off() {
        let at = start(address("127.0.0.1:0").unwrap(), || "a 1\n".into()).unwrap();
        assert!(asked(at, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").ends_with("\r\n\r\na 1\n"));
        assert!(asked(at, b"GET /etc/passwd HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "));
        assert!(asked(at, &[b'x'; 3 * REQUEST_MAX]).starts_with("HTTP/1.1 431 "));
        // Clients that say nothing, more than are served at a time: the port answers again when they are gone.
        let idle: Vec<TcpStream> = (0..2 * SOCKET.most).map(|_| TcpStream::connect(at).unwrap()).collect();
        drop(idle);
        let end = Instant::now() + 10 * PATIENCE;
        while !asked(at, b"GET /metrics HTTP/1.0\r\n\r\n").starts_with("HTTP/1.1 200 ") {
            assert!(Instant::now() < end);
            std::thread::yield_now();
        }
    }
}
