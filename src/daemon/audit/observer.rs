//! From what is told of keys to events, and telling several who listen.

use super::Log;
use super::line::{Counts, Fields, text};
use crate::format::ids::{FileId, KekId, RootKeyId};
use crate::kms::event::{self, Call, Caller, Change, DekUse, Observer, Operation};
use crate::kms::{KeyPurpose, KmsError};
use std::sync::Arc;
use std::time::Duration;

/// What is refused for a reason of access or damage.
const DENY: &str = "deny";

/// Tells each of several observers, in order.
pub struct Fan(pub Vec<Arc<dyn Observer>>);

impl Observer for Fan {
    fn call(&self, c: &Call<'_>) {
        self.0.iter().for_each(|o| o.call(c));
        // A DEK that a key service wraps is told of twice: as this call, and by the store as the use of a DEK, which is to
        // have the request's id too.
        if let Some(id) = c.request_id.clone().filter(|_| is_of_dek(c)) {
            event::note_request_id(id);
        }
    }

    fn dek(&self, u: &DekUse<'_>) {
        self.0.iter().for_each(|o| o.dek(u));
    }

    fn change(&self, c: &Change<'_>) {
        self.0.iter().for_each(|o| o.change(c));
    }

    fn permit(&self) -> Result<(), KmsError> {
        self.0.iter().try_for_each(|o| o.permit())
    }
}

fn is_of_dek(c: &Call<'_>) -> bool {
    c.context.is_some_and(|x| x.purpose == KeyPurpose::Dek)
}

impl Observer for Log {
    fn call(&self, c: &Call<'_>) {
        // Each use of a DEK is told by the store, with what only that knows; health is told of as a change.
        if is_of_dek(c) || c.operation == Operation::Health {
            return;
        }
        let (event, result) = outcome(c.operation, c.result.map_err(KmsError::code));
        let object = c.context.map(|x| x.object).unwrap_or_default();
        let purpose = c.context.map(|x| x.purpose);
        let fields = Fields {
            operation: Some(c.operation.as_str()),
            key: purpose.map(KeyPurpose::as_str),
            kek: (purpose == Some(KeyPurpose::Kek)).then_some(KekId(object)),
            provider: Some(text(c.provider)),
            request_id: c.request_id.as_deref().map(text),
            latency_us: Some(micros(c.latency)),
            result: Some(result),
            ..of_caller(c.caller)
        };
        self.event(event, fields);
    }

    fn dek(&self, u: &DekUse<'_>) {
        let (event, result) = outcome(u.operation, u.result);
        let (event, purpose) = if u.ahead { ahead(u.operation, event) } else { (event, None) };
        let fields = Fields {
            operation: Some(u.operation.as_str()),
            purpose,
            key: Some(KeyPurpose::Dek.as_str()),
            file: Some(FileId(u.file)),
            kek: Some(KekId(u.kek)),
            from_kek: u.from.map(KekId),
            provider: Some(text(u.provider)),
            request_id: u.request_id.as_deref().map(text),
            latency_us: Some(micros(u.latency)),
            result: Some(result),
            ..of_caller(u.caller)
        };
        self.event(event, fields);
    }

    fn change(&self, c: &Change<'_>) {
        let ok = || Some("ok".to_owned());
        let by = of_caller(event::caller());
        match c {
            Change::Kek { kek, change } => {
                let fields = Fields { kek: Some(KekId(*kek)), state: Some(change.as_str()), result: ok(), ..by };
                self.event("kek", fields);
            }
            Change::RootKey { id, uri, added } => {
                let state = if *added { "added" } else { "removed" };
                let root_key = Some(RootKeyId(*id));
                let fields = Fields { root_key, provider: Some(text(uri)), state: Some(state), result: ok(), ..by };
                self.event("root-key", fields);
            }
            Change::Rotation { target, step, counts, result } => {
                let counts = counts.iter().map(|(k, v)| ((*k).to_owned().into(), *v)).collect();
                let result = result.err().unwrap_or("ok").to_owned();
                let fields = Fields {
                    kek: target.map(KekId),
                    step: Some((*step).to_owned()),
                    counts: Some(Counts(counts)),
                    result: Some(result),
                    ..by
                };
                self.event("rotate", fields);
            }
            Change::Waived { target, path, code } => {
                let fields = Fields {
                    kek: Some(KekId(*target)),
                    about: Some(text(path)),
                    result: Some((*code).to_owned()),
                    ..by
                };
                self.event("waived", fields);
            }
            Change::Store { change, about } => {
                let about = Some(text(about)).filter(|a| !a.is_empty());
                self.event(change.as_str(), Fields { about, result: ok(), ..by });
            }
        }
    }

    fn permit(&self) -> Result<(), KmsError> {
        match self.refusal() {
            Some(why) => Err(KmsError::Unreachable(why)),
            None => Ok(()),
        }
    }
}

/// The event that a use of a key is, and its result. What a service did not answer, or a wrap that was not asked for by
/// anything but a state, is no denial.
fn outcome(o: Operation, result: Result<(), &str>) -> (&'static str, String) {
    let name = match o {
        // What a service makes, it wraps.
        Operation::Generate => Operation::Wrap.as_str(),
        other => other.as_str(),
    };
    match result {
        Ok(()) => (name, "ok".to_owned()),
        Err(code @ ("kms-unreachable" | "kms-throttled")) => (name, code.to_owned()),
        Err(code) => (DENY, code.to_owned()),
    }
}

/// The event that a use ahead of need is, and what it is for: a wrap is not a new file's yet.
fn ahead(o: Operation, event: &'static str) -> (&'static str, Option<&'static str>) {
    match (o, event) {
        (Operation::Wrap, DENY) => (DENY, Some("pool")),
        (Operation::Wrap, _) => ("prepare", Some("pool")),
        (_, event) => (event, Some("prefetch")),
    }
}

fn micros(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}

/// Who it was for. The program is looked up now, while the caller waits for its answer; it may be gone or hidden from us.
fn of_caller(c: Option<Caller>) -> Fields {
    let Some(c) = c else { return Fields::default() };
    // A process of another namespace has no number here.
    let pid = Some(c.pid).filter(|p| *p != 0);
    let exe = pid.and_then(|p| std::fs::read_link(format!("/proc/{p}/exe")).ok());
    Fields { pid, uid: Some(c.uid), exe: exe.map(|e| text(&e.to_string_lossy())), ..Fields::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    #[test]
    fn refusals_are_denials_and_silence_is_not() {
        assert_eq!(outcome(Operation::Unwrap, Ok(())), ("unwrap", "ok".into()));
        assert_eq!(outcome(Operation::Generate, Ok(())), ("wrap", "ok".into()));
        for silent in ["kms-unreachable", "kms-throttled"] {
            assert_eq!(outcome(Operation::Unwrap, Err(silent)), ("unwrap", silent.into()));
        }
        for refused in ["kms-denied", "kms-disabled", "kms-bad-ciphertext", "wrap-auth", "kek-destroyed", "kek-unknown"]
        {
            assert_eq!(outcome(Operation::Rewrap, Err(refused)), ("deny", refused.into()));
        }
    }

    #[test]
    fn what_is_done_ahead_of_need_says_what_for() {
        for (o, result, told) in [
            (Operation::Wrap, Ok(()), ("prepare", Some("pool"))),
            (Operation::Wrap, Err("kms-throttled"), ("prepare", Some("pool"))),
            (Operation::Wrap, Err("kms-denied"), ("deny", Some("pool"))),
            (Operation::Unwrap, Ok(()), ("unwrap", Some("prefetch"))),
            (Operation::Unwrap, Err("kms-denied"), ("deny", Some("prefetch"))),
        ] {
            assert_eq!(ahead(o, outcome(o, result).0), told);
        }
    }

    #[test]
    fn the_caller_is_named_with_his_program() {
        let me = Caller { pid: std::process::id(), uid: 7 };
        let f = of_caller(Some(me));
        assert_eq!((f.pid, f.uid), (Some(me.pid), Some(7)));
        assert_eq!(f.exe.unwrap(), std::env::current_exe().unwrap().to_string_lossy());
        let hidden = of_caller(Some(Caller { pid: 0, uid: 7 }));
        assert_eq!((hidden.pid, hidden.uid, hidden.exe), (None, Some(7), None));
        assert_eq!(of_caller(None), Fields::default());
    }

    #[derive(Default)]
    struct Heard(Mutex<Vec<&'static str>>, Option<KmsError>);

    impl Observer for Heard {
        fn call(&self, _: &Call<'_>) {
            self.0.lock().push("call");
        }

        fn dek(&self, _: &DekUse<'_>) {
            self.0.lock().push("dek");
        }

        fn change(&self, _: &Change<'_>) {
            self.0.lock().push("change");
        }

        fn permit(&self) -> Result<(), KmsError> {
            self.1.clone().map_or(Ok(()), Err)
        }
    }

    #[test]
    fn everybody_hears_everything_and_anybody_can_refuse() {
        let (a, b) = (Arc::new(Heard::default()), Arc::new(Heard::default()));
        let fan = Fan(vec![a.clone(), b.clone()]);
        let context =
            crate::kms::WrapContext { store: [0; 16], purpose: KeyPurpose::Dek, object: [0; 16], extra: Vec::new() };
        let call = Call {
            operation: Operation::Unwrap,
            provider: "p",
            context: Some(&context),
            kek: None,
            request_id: Some("r1".into()),
            latency: Duration::ZERO,
            result: Ok(()),
            caller: None,
        };
        fan.call(&call);
        assert_eq!(event::take_request_id().as_deref(), Some("r1"), "for the use of the DEK that follows");
        fan.change(&Change::Store { change: event::StoreChange::Lock, about: "" });
        assert_eq!(*a.0.lock(), ["call", "change"]);
        assert_eq!(*b.0.lock(), ["call", "change"]);
        assert_eq!(fan.permit(), Ok(()));
        let no = KmsError::Unreachable("x".into());
        let fan = Fan(vec![a, Arc::new(Heard(Mutex::default(), Some(no.clone())))]);
        assert_eq!(fan.permit(), Err(no));
    }
}
