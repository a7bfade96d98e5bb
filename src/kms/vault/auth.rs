//! Logging in: which request, with which secrets, and what its answer grants. Secrets are read from their files each
//! time, so that a new one is taken up without a new mount.

use super::answer::{self, Place};
use super::client::{Client, Token, parse};
use super::files::{self, Mode};
use super::lease::Lease;
use super::settings::{Login, Settings, TokenSource};
use crate::kms::KmsError;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// A token and how long it lives.
pub struct Session {
    pub token: Token,
    pub client: Client,
    /// Whether we got it ourselves just now: then it is good.
    pub by_login: bool,
    pub lease: parking_lot::Mutex<Lease>,
    /// Held while somebody renews or replaces it.
    pub care: parking_lot::Mutex<()>,
}

#[derive(Serialize)]
struct Approle<'a> {
    role_id: &'a str,
    secret_id: &'a str,
}

#[derive(Serialize)]
struct Kubernetes<'a> {
    role: &'a str,
    jwt: &'a str,
}

#[derive(Serialize)]
struct Certificate<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
}

#[derive(Deserialize)]
struct Granted<'a> {
    #[serde(borrow)]
    auth: Auth<'a>,
}

#[derive(Deserialize)]
struct Auth<'a> {
    client_token: &'a str,
    /// Seconds; 0: for ever.
    lease_duration: u64,
    renewable: bool,
}

#[derive(Deserialize)]
struct Looked {
    data: Looking,
}

#[derive(Deserialize)]
struct Looking {
    /// Seconds that are left; 0: for ever.
    ttl: u64,
    #[serde(default)]
    renewable: bool,
}

/// JSON with secrets in it, in one piece.
fn json(value: &impl Serialize) -> Result<Zeroizing<Vec<u8>>, KmsError> {
    let mut body = Zeroizing::new(Vec::with_capacity(64 * 1024));
    serde_json::to_writer(&mut *body, value).map_err(|e| KmsError::Config(format!("login: {e}")))?;
    Ok(body)
}

/// Logs in. `refused` is the session whose token the server has just refused.
///
/// # Errors
/// [`KmsError::Credentials`] if the server refuses what there is, or the token to be read is still the refused one;
/// what the files or the server say.
pub fn login(settings: &Arc<Settings>, place: &Place, refused: Option<&Session>) -> Result<Session, KmsError> {
    let client = Client::new(settings)?;
    let request = |mount: &str, body: &[u8]| {
        let g = granted(&client, place, &format!("auth/{mount}/login"), None, body)?;
        Ok((g.token, Lease::granted(Instant::now(), g.ttl, g.renewable)))
    };
    let (token, lease) = match &settings.login {
        Login::Token(source) => existing(&client, place, source, refused)?,
        Login::Approle { mount, role_id, secret_id_file } => {
            let secret_id = files::line(secret_id_file, "secret id", Mode::Secret)?;
            request(mount, &json(&Approle { role_id, secret_id: &secret_id })?)?
        }
        Login::Kubernetes { mount, role, jwt_file } => {
            let jwt = files::line(jwt_file, "service account token", Mode::Public)?;
            request(mount, &json(&Kubernetes { role, jwt: &jwt })?)?
        }
        Login::Certificate { mount, role, .. } => request(mount, &json(&Certificate { name: role.as_deref() })?)?,
    };
    let by_login = !matches!(settings.login, Login::Token(_));
    let (lease, care) = (parking_lot::Mutex::new(lease), parking_lot::Mutex::default());
    Ok(Session { token, client, by_login, lease, care })
}

/// A token that somebody else made. Whether it is good the first use shows: looking it up may be denied to a good one.
fn existing(
    client: &Client,
    place: &Place,
    source: &TokenSource,
    refused: Option<&Session>,
) -> Result<(Token, Lease), KmsError> {
    let (text, from) = match source {
        TokenSource::File(path) => (files::line(path, "token file", Mode::Secret)?, path.display().to_string()),
        TokenSource::Environment(name) => {
            let value = Zeroizing::new(std::env::var(name).unwrap_or_default());
            let text = files::one_line(value.as_bytes())
                .ok_or_else(|| KmsError::Credentials(format!("{name}: holds no token")))?;
            (text, (*name).to_owned())
        }
    };
    let token = Token::new(text);
    if refused.is_some_and(|r| r.token.same(&token)) {
        return Err(KmsError::Credentials(format!(
            "{}: the token in {from} is expired, revoked or was never good; put a new one there",
            place.name()
        )));
    }
    let lease = lookup(client, place, &token)?.unwrap_or(Lease::UNKNOWN);
    Ok((token, lease))
}

/// Asks the server about a token: `None` if it refuses to say, which is what it does with a bad one.
///
/// # Errors
/// The server's.
pub fn lookup(client: &Client, place: &Place, token: &Token) -> Result<Option<Lease>, KmsError> {
    let path = "auth/token/lookup-self";
    let a = client.send(path, Some(token), None)?;
    match answer::login_failure(a.status, &a.text(), path, place) {
        None => {
            let d = parse::<Looked>(&a, place)?.data;
            Ok(Some(Lease::granted(Instant::now(), Duration::from_secs(d.ttl), d.renewable)))
        }
        Some(KmsError::Credentials(_)) => Ok(None),
        Some(e) => Err(e),
    }
}

/// Makes a session's token live on: its new lease, or `None` if the server refuses.
///
/// # Errors
/// The server's.
pub fn renew(s: &Session, place: &Place) -> Result<Option<Lease>, KmsError> {
    match granted(&s.client, place, "auth/token/renew-self", Some(&s.token), b"{}") {
        Ok(g) => Ok(Some(s.lease.lock().renewed(Instant::now(), g.ttl, g.renewable))),
        Err(KmsError::Credentials(_)) => Ok(None),
        Err(e) => Err(e),
    }
}

struct Grant {
    token: Token,
    ttl: Duration,
    renewable: bool,
}

fn granted(client: &Client, place: &Place, path: &str, token: Option<&Token>, body: &[u8]) -> Result<Grant, KmsError> {
    let a = client.send(path, token, Some(body))?;
    if let Some(e) = answer::login_failure(a.status, &a.text(), path, place) {
        return Err(e);
    }
    let auth = parse::<Granted<'_>>(&a, place)?.auth;
    let text = files::one_line(auth.client_token.as_bytes()).ok_or_else(|| answer::nonsense(place))?;
    Ok(Grant { token: Token::new(text), ttl: Duration::from_secs(auth.lease_duration), renewable: auth.renewable })
}
