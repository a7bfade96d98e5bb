//! The SDK's client: where the service is, who we are, and how long to wait.

use super::arn::Target;
use super::runtime;
use crate::kms::KmsError;
use crate::kms::services::AwsOptions;
use crate::kms::uri::AwsKey;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_kms::Client;
use std::net::IpAddr;
use std::time::Duration;

const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
/// What getting credentials may take on top: they come from other services and programs, whose pace is not the
/// service's. The SDK gives up on them after five seconds by itself.
const CREDENTIALS_TIMEOUT: Duration = Duration::from_secs(8);

/// What a client needs to know, before anything has been asked of the SDK.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Only from the configuration, never from a store.
    endpoint: Option<String>,
    region: Option<String>,
    profile: Option<String>,
    connect_timeout: Duration,
    attempt_timeout: Duration,
}

impl Settings {
    /// From the URI, or else from the configuration. Also tells which key it is about.
    ///
    /// # Errors
    /// [`KmsError::Config`] if they do not fit together.
    pub fn new(uri: AwsKey<'_>, o: &AwsOptions) -> Result<(Self, Target), KmsError> {
        let (target, region) = Target::new(uri.key, uri.region)?;
        if let Some(e) = &o.endpoint {
            check_endpoint(e)?;
        }
        let time = |ms: Option<u64>, default| match ms {
            Some(0) => Err(KmsError::Config("[services.aws-kms]: a time-out of 0 lets no call through".into())),
            Some(ms) => Ok(Duration::from_millis(ms)),
            None => Ok(default),
        };
        let settings = Self {
            endpoint: o.endpoint.clone(),
            region: region.or_else(|| o.region.clone()),
            profile: uri.profile.map(str::to_owned).or_else(|| o.profile.clone()),
            connect_timeout: time(o.connect_timeout_ms, CONNECT_TIMEOUT)?,
            attempt_timeout: time(o.attempt_timeout_ms, ATTEMPT_TIMEOUT)?,
        };
        Ok((settings, target))
    }

    /// The profile, unless the SDK chooses it.
    pub fn profile(&self) -> Option<&str> {
        self.profile.as_deref()
    }
}

/// Keys go there in clear but for TLS, so without it only to this machine.
fn check_endpoint(text: &str) -> Result<(), KmsError> {
    let bad = |why: &str| Err(KmsError::Config(format!("[services.aws-kms] endpoint {text:?}: {why}")));
    let (scheme, rest) = text.split_once("://").unwrap_or_default();
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if !["http", "https"].contains(&scheme) || authority.is_empty() || text.chars().any(|c| c.is_whitespace()) {
        return bad("write https://HOST or https://HOST:PORT");
    }
    if authority.contains('@') {
        return bad("credentials do not belong there");
    }
    if scheme == "http" && !is_loopback(authority) {
        return bad("keys would cross the network in clear; use https://");
    }
    Ok(())
}

fn is_loopback(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

/// Makes the client; reads the environment and the profile files, and may ask the machine's metadata service for the
/// region, but does not talk to AWS KMS.
///
/// # Errors
/// [`KmsError::Config`] if there is no region; [`KmsError::Unreachable`] if finding it out takes too long.
pub fn connect(s: &Settings) -> Result<Client, KmsError> {
    let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12());
    if let Some(r) = &s.region {
        loader = loader.region(Region::new(r.clone()));
    }
    if let Some(p) = &s.profile {
        loader = loader.profile_name(p);
    }
    let sdk = runtime::wait(async { tokio::time::timeout(CREDENTIALS_TIMEOUT, loader.load()).await })?;
    let sdk = sdk.map_err(|_| KmsError::Unreachable("AWS: looking for the region and profile took too long".into()))?;
    if sdk.region().is_none() {
        return Err(KmsError::Config(
            "aws-kms: no region; write aws-kms://…?region=REGION, use the key's ARN, or set `region` under \
             [services.aws-kms] or AWS_REGION"
                .into(),
        ));
    }
    Ok(Client::from_conf(configure(s, &sdk)))
}

/// One attempt for a call, with its own limits: retries, breaker and limiter stand above every provider, and the SDK's
/// own would multiply with them. They hold for AWS KMS only; STS, SSO and IMDS, where credentials come from, keep the
/// SDK's. So does the endpoint.
fn configure(s: &Settings, sdk: &SdkConfig) -> aws_sdk_kms::Config {
    // The SDK's own limit for an attempt would count getting credentials too, and break it off each time anew.
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(s.connect_timeout)
        .read_timeout(s.attempt_timeout)
        .operation_timeout(s.attempt_timeout + CREDENTIALS_TIMEOUT)
        .build();
    let mut config =
        aws_sdk_kms::config::Builder::from(sdk).retry_config(RetryConfig::disabled()).timeout_config(timeouts);
    if let Some(e) = &s.endpoint {
        config = config.endpoint_url(e);
    }
    config.build()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key<'a>(key: &'a str, region: Option<&'a str>, profile: Option<&'a str>) -> AwsKey<'a> {
        AwsKey { key, region, profile }
    }

    #[test]
    fn the_uri_comes_before_the_configuration() {
        let o = AwsOptions { region: Some("r-conf".into()), profile: Some("p-conf".into()), ..Default::default() };
        let arn = "arn:aws:kms:r-arn:1:key/k";
        for (uri, region, profile) in [
            (key("alias/a", None, None), "r-conf", "p-conf"),
            (key("alias/a", Some("r-uri"), Some("p-uri")), "r-uri", "p-uri"),
            (key(arn, None, None), "r-arn", "p-conf"),
        ] {
            let (s, _) = Settings::new(uri, &o).unwrap();
            assert_eq!((s.region.as_deref(), s.profile.as_deref()), (Some(region), Some(profile)), "{uri:?}");
        }
        let (s, _) = Settings::new(key("alias/a", None, None), &AwsOptions::default()).unwrap();
        assert_eq!((s.region, s.profile, s.endpoint), (None, None, None));
        assert_eq!((s.connect_timeout, s.attempt_timeout), (Duration::from_millis(500), Duration::from_secs(2)));
    }

    #[test]
    fn an_endpoint_is_https_or_this_machine() {
        let check = |e: &str| {
            let o = AwsOptions { endpoint: Some(e.into()), ..Default::default() };
            Settings::new(key("alias/a", None, None), &o).map(|(s, _)| s.endpoint)
        };
        for good in [
            "https://vpce-1.kms.eu-west-1.vpce.amazonaws.com",
            "https://host:8443/path",
            "http://127.0.0.1:4566",
            "http://localhost",
            "http://[::1]:80/",
        ] {
            assert_eq!(check(good), Ok(Some(good.to_owned())));
        }
        for bad in [
            "",
            "host",
            "ftp://host",
            "https://",
            "https:///path",
            "https://user:secret@host",
            "http://host",
            "http://127.0.0.1.evil.example",
            "http://localhost.evil.example",
            "http://127.0.0.1@evil.example",
            "https://a b",
        ] {
            assert!(matches!(check(bad), Err(KmsError::Config(_))), "{bad}");
        }
    }

    #[test]
    fn no_call_can_wait_no_time() {
        let o = AwsOptions { attempt_timeout_ms: Some(0), ..Default::default() };
        assert!(matches!(Settings::new(key("alias/a", None, None), &o), Err(KmsError::Config(_))));
    }
}
