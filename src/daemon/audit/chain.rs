//! The chain of the audit log: how a record is bound to the one before it, how a log that was found goes on, and whether a
//! log is whole. Pure: lines in, answers out.

use super::line::{self, Event, Fields, Hash, Parsed, Seal, SealKey, hash_from, hex};
use crate::crypto::kdf::sha256;
use crate::format::ids::StoreId;

/// The first record of a chain.
pub const STARTED: &str = "started";
/// The first record of a file that goes on with the chain of the file before it.
pub const CONTINUED: &str = "continued";
/// Accounts for a line that was torn by a crash.
pub const RECOVERED: &str = "recovered";
/// A record with a MAC.
pub const SEAL: &str = "seal";
/// Tells how many events could not be written.
pub const GAP: &str = "gap";
/// A writer seals at least every so many records.
pub const SEAL_EVERY: u64 = 256;

/// Where a chain has got to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chain {
    /// Number of the last record; 0 before the first.
    pub seq: u64,
    /// Hash of the last line; zeros before the first.
    pub head: Hash,
}

impl Chain {
    /// Before the first record.
    pub const EMPTY: Self = Self { seq: 0, head: [0; 32] };

    /// Puts `e` at the end of the chain and returns its line, without a newline.
    pub fn append(&mut self, e: &Event, store: StoreId, seal: Option<&SealKey>) -> Vec<u8> {
        let line = line::encode(e, store, self.seq + 1, &self.head, seal);
        *self = Self { seq: self.seq + 1, head: sha256(&line) };
        line
    }

    /// As [`Chain::append`], of the record that accounts for `torn`.
    pub fn recover(&mut self, torn: &Torn, store: StoreId) -> Vec<u8> {
        let fields = Fields { after: Some(hex(&self.head)), torn_bytes: Some(torn.len), ..Fields::default() };
        self.head = torn.hash;
        self.append(&Event::now(RECOVERED, fields), store, None)
    }

    fn is_next(&self, p: &Parsed<'_>) -> bool {
        self.seq.checked_add(1) == Some(p.seq) && hash_from(&p.prev) == Some(self.head)
    }
}

/// The rest of a line whose writing was cut short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Torn {
    pub hash: Hash,
    pub len: u64,
}

impl Torn {
    fn of(bytes: &[u8]) -> Self {
        Self { hash: sha256(bytes), len: bytes.len() as u64 }
    }
}

/// How a log that was found ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tail {
    /// Where its chain has got to.
    pub chain: Chain,
    /// Whose records these are; `None` if there is none.
    pub store: Option<StoreId>,
    /// The last line has no newline.
    pub unfinished: bool,
    /// What follows the last record.
    pub torn: Option<Torn>,
}

/// Most that may follow the last record, in bytes. What is read of a log that is gone on with.
pub const TORN_MAX: usize = 1 << 20;

/// Why nothing can be appended to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotALog {
    #[error("it holds no audit record")]
    NoRecord,
    #[error("more follows its last record than a crash leaves")]
    TooLong,
}

/// Judges the end of a log from its last bytes; `from_start`: these are all of it. What follows the last record was torn:
/// one line, or several if a crash came while an earlier one was being accounted for. A line that is cut short is never a
/// record, because only its end closes the JSON object.
///
/// # Errors
/// [`NotALog`]: it is damaged, or something else.
pub fn tail(bytes: &[u8], from_start: bool) -> Result<Tail, NotALog> {
    let mut t = Tail { chain: Chain::EMPTY, store: None, unfinished: !bytes.ends_with(b"\n"), torn: None };
    if bytes.is_empty() && from_start {
        return Ok(Tail { unfinished: false, ..t });
    }
    let body = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let mut end = body.len();
    loop {
        let upto = body.get(..end).unwrap_or_default();
        let newline = upto.iter().rposition(|b| *b == b'\n');
        if newline.is_none() && !from_start {
            return Err(NotALog::TooLong);
        }
        let line = upto.get(newline.map_or(0, |i| i + 1)..).unwrap_or_default();
        if let Some(p) = line::parse(line).filter(|p| hash_from(&p.prev).is_some()) {
            t.chain = Chain { seq: p.seq, head: sha256(line) };
            t.store = Some(p.store);
            t.torn = body.get(end + 1..).map(Torn::of);
            return Ok(t);
        }
        match newline {
            Some(i) => end = i,
            // The first record of all was torn, if it is that.
            None if is_torn_first(body) => return Ok(Tail { torn: Some(Torn::of(body)), ..t }),
            None => return Err(NotALog::NoRecord),
        }
    }
}

/// Whether this can be what crashes leave of a log's first record: its beginning, and whatever was begun on later lines, or
/// zeros where it was to be.
fn is_torn_first(bytes: &[u8]) -> bool {
    const BEGINS: &[u8] = b"{\"time\":\"";
    let first = bytes.split(|b| *b == b'\n').next().unwrap_or_default();
    let n = first.len().min(BEGINS.len());
    let begun = n > 0 && first.get(..n) == BEGINS.get(..n);
    begun || (!bytes.is_empty() && bytes.iter().all(|b| *b == 0))
}

/// Why a line is not what it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    #[error("is no audit record")]
    NotARecord,
    #[error("is longer than a record can be")]
    TooLong,
    #[error("is not whole: it was torn by a crash that no mount has followed yet, is being written, or was cut")]
    NotWhole,
    #[error("does not follow from the line before it: that one or this one was changed, or others removed or put in")]
    Broken,
    #[error("has not the number that follows the one before it")]
    Number,
    #[error("is the first, and neither starts a log nor continues one: what came before it was removed")]
    Beginning,
    #[error("begins a log in the middle of this one")]
    BeginsAgain,
    #[error("does not continue the file before it")]
    NotContinued,
    #[error("accounts for a torn line that is not there")]
    NothingTorn,
    #[error("is about another store")]
    OtherStore,
    #[error("is a seal without a MAC")]
    SealShape,
    #[error("is a seal that was not made with this store's key")]
    SealForged,
    #[error("is the last seal, and more records follow it than a writer with the store's key leaves unsealed")]
    Unsealed,
    #[error("is the last one, and there is no seal: nothing shows that it was written with the store's key")]
    NoSeal,
    #[error(
        "is the last one, and the head that was expected is not in the log: its end was cut off, or it was rewritten"
    )]
    NoHead,
}

impl Why {
    /// Stable code.
    pub fn code(self) -> &'static str {
        match self {
            Self::NotARecord => "not-a-record",
            Self::TooLong => "too-long",
            Self::NotWhole => "not-whole",
            Self::Broken => "broken",
            Self::Number => "number",
            Self::Beginning => "beginning",
            Self::BeginsAgain => "begins-again",
            Self::NotContinued => "not-continued",
            Self::NothingTorn => "nothing-torn",
            Self::OtherStore => "other-store",
            Self::SealShape => "seal-shape",
            Self::SealForged => "seal-forged",
            Self::Unsealed => "unsealed",
            Self::NoSeal => "no-seal",
            Self::NoHead => "no-head",
        }
    }
}

/// The first line that is bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("line {line} {why}")]
pub struct Bad {
    /// Counted from 1, in the file that was begun last.
    pub line: u64,
    pub why: Why,
}

/// A seal that was met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sealed {
    /// Which file, counted from 0, and which line of it, counted from 1.
    pub file: usize,
    pub line: u64,
    pub seq: u64,
    pub seal: Seal,
}

/// How a log begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beginning {
    /// With the first record of a chain.
    Start,
    /// With a file that goes on with this chain, of which nothing was shown.
    After(Chain),
}

/// What a log that is whole holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    pub store: StoreId,
    pub beginning: Beginning,
    /// Chains in it: more than one if a later file starts anew.
    pub chains: u64,
    pub records: u64,
    /// Where it ends.
    pub end: Chain,
    /// Number and time of the last record.
    pub last_time: String,
    /// Torn lines that are accounted for.
    pub recovered: u64,
    /// Events that the log itself says could not be written.
    pub lost: u64,
    pub seals: Vec<Sealed>,
    /// Records after the last seal.
    pub unsealed: u64,
    /// Files, and lines of the last one.
    pub files: usize,
    pub last_line: u64,
}

impl Summary {
    /// Judges what the seals prove, given which of them are not genuine, by their place in [`Summary::seals`].
    ///
    /// # Errors
    /// In which file: the first seal that is not genuine; the last one if too much follows it, or the last line if there
    /// is none: then nothing shows that somebody with the key wrote that.
    pub fn judge_seals(&self, forged: impl Fn(usize) -> bool) -> Result<(), (usize, Bad)> {
        if let Some((_, s)) = self.seals.iter().enumerate().find(|(i, _)| forged(*i)) {
            return Err((s.file, Bad { line: s.line, why: Why::SealForged }));
        }
        match self.seals.last() {
            None => Err((self.files.saturating_sub(1), Bad { line: self.last_line, why: Why::NoSeal })),
            Some(s) if self.unsealed > SEAL_EVERY => Err((s.file, Bad { line: s.line, why: Why::Unsealed })),
            Some(_) => Ok(()),
        }
    }
}

/// Lines that are no records in their place.
#[derive(Debug)]
struct Doubt {
    first: Bad,
    /// All of them, with the newlines between them.
    bytes: Vec<u8>,
}

/// Checks a log of one or several files, line by line.
#[derive(Debug)]
pub struct Verifier {
    chain: Chain,
    store: Option<StoreId>,
    beginning: Option<Beginning>,
    chains: u64,
    records: u64,
    last_time: String,
    recovered: u64,
    lost: u64,
    seals: Vec<Sealed>,
    unsealed: u64,
    /// Files begun, and lines of the last one.
    files: usize,
    line: u64,
    /// Lines that are bad, unless one follows that accounts for them.
    doubtful: Option<Doubt>,
    /// Records that are to be in it and have not been met.
    missing: Vec<Hash>,
}

impl Verifier {
    /// Checks records of `store`, or of whichever store the first one is about.
    pub fn new(store: Option<StoreId>) -> Self {
        Self {
            chain: Chain::EMPTY,
            store,
            beginning: None,
            chains: 0,
            records: 0,
            last_time: String::new(),
            recovered: 0,
            lost: 0,
            seals: Vec::new(),
            unsealed: 0,
            files: 0,
            line: 0,
            doubtful: None,
            missing: Vec::new(),
        }
    }

    /// Requires that a record with this hash is in it.
    pub fn require(&mut self, head: Hash) {
        self.missing.push(head);
    }

    /// Begins the next file, which goes on where the one before it ended.
    ///
    /// # Errors
    /// As [`Verifier::end_of_file`], of the file before.
    pub fn begin_file(&mut self) -> Result<(), Bad> {
        if self.files > 0 {
            self.end_of_file()?;
        }
        self.files += 1;
        self.line = 0;
        Ok(())
    }

    /// Checks the next line, given without its newline; `whole`: it had one.
    ///
    /// # Errors
    /// The first bad line, once it is certain that none follows which accounts for it; [`Verifier::end_of_file`] says the
    /// others.
    pub fn line(&mut self, bytes: &[u8], whole: bool) -> Result<(), Bad> {
        self.line += 1;
        if let Some(mut doubt) = self.doubtful.take() {
            if whole && self.accounts_for(bytes, &doubt) {
                return Ok(());
            }
            doubt.bytes.push(b'\n');
            doubt.bytes.extend_from_slice(bytes);
            if doubt.bytes.len() > TORN_MAX {
                return Err(doubt.first);
            }
            self.doubtful = Some(doubt);
            return Ok(());
        }
        let checked = if whole { self.check(bytes) } else { Err(Why::NotWhole) };
        if let Err(why) = checked {
            self.doubtful = Some(Doubt { first: Bad { line: self.line, why }, bytes: bytes.to_vec() });
        }
        Ok(())
    }

    /// A line that was too long to be looked at.
    pub fn too_long(&self) -> Bad {
        let this = Bad { line: self.line + 1, why: Why::TooLong };
        self.doubtful.as_ref().map_or(this, |d| d.first)
    }

    /// No more lines in this file.
    ///
    /// # Errors
    /// The last line, if it was bad; line 1 if there is none.
    pub fn end_of_file(&self) -> Result<(), Bad> {
        match (&self.doubtful, self.line) {
            (Some(doubt), _) => Err(doubt.first),
            (None, 0) => Err(Bad { line: 1, why: Why::NotARecord }),
            (None, _) => Ok(()),
        }
    }

    /// No more files.
    ///
    /// # Errors
    /// As [`Verifier::end_of_file`]; [`Why::NoHead`].
    pub fn end(self) -> Result<Summary, Bad> {
        self.end_of_file()?;
        if !self.missing.is_empty() {
            return Err(Bad { line: self.line, why: Why::NoHead });
        }
        let (Some(store), Some(beginning)) = (self.store, self.beginning) else {
            return Err(Bad { line: 1, why: Why::NotARecord });
        };
        Ok(Summary {
            store,
            beginning,
            chains: self.chains,
            records: self.records,
            end: self.chain,
            last_time: self.last_time,
            recovered: self.recovered,
            lost: self.lost,
            seals: self.seals,
            unsealed: self.unsealed,
            files: self.files,
            last_line: self.line,
        })
    }

    fn check(&mut self, bytes: &[u8]) -> Result<(), Why> {
        let p = line::parse(bytes).ok_or(Why::NotARecord)?;
        let prev = hash_from(&p.prev).ok_or(Why::NotARecord)?;
        if self.store.is_some_and(|s| s != p.store) {
            return Err(Why::OtherStore);
        }
        let begins = matches!(&*p.event, STARTED | CONTINUED);
        match (self.line == 1, begins) {
            (true, true) => self.begins(&p, prev)?,
            (true, false) => return Err(Why::Beginning),
            (false, true) => return Err(Why::BeginsAgain),
            (false, false) if p.event == RECOVERED => return Err(Why::NothingTorn),
            (false, false) if prev != self.chain.head => return Err(Why::Broken),
            (false, false) if !self.chain.is_next(&p) => return Err(Why::Number),
            (false, false) => {}
        }
        // Whatever ends as a seal is held to be one, so that a seal cannot be made into something else.
        let seal = line::seal_of(bytes);
        if p.event == SEAL && seal.is_none() {
            return Err(Why::SealShape);
        }
        self.accept(&p, bytes, seal);
        Ok(())
    }

    /// The first record of a file.
    fn begins(&mut self, p: &Parsed<'_>, prev: Hash) -> Result<(), Why> {
        let before = Chain { seq: p.seq.checked_sub(1).ok_or(Why::Number)?, head: prev };
        if p.event == STARTED {
            if before != Chain::EMPTY {
                return Err(Why::Beginning);
            }
            self.beginning.get_or_insert(Beginning::Start);
            self.chains += 1;
        } else if self.files > 1 {
            if before != self.chain {
                return Err(Why::NotContinued);
            }
        } else {
            if before.seq == 0 {
                return Err(Why::Number);
            }
            self.beginning = Some(Beginning::After(before));
            self.chains += 1;
        }
        self.chain = before;
        Ok(())
    }

    /// Whether this line accounts for what was torn before it; if so, takes it in.
    fn accounts_for(&mut self, bytes: &[u8], doubt: &Doubt) -> bool {
        let Some(p) = line::parse(bytes).filter(|p| p.event == RECOVERED) else { return false };
        let torn = Torn::of(&doubt.bytes);
        // A file whose first record was torn begins with nothing.
        let first = doubt.first.line == 1;
        let before = if first { Chain::EMPTY } else { self.chain };
        let fits = hash_from(&p.prev) == Some(torn.hash)
            && p.torn_bytes == Some(torn.len)
            && p.after.as_deref().and_then(hash_from) == Some(before.head)
            && before.seq.checked_add(1) == Some(p.seq)
            && self.store.is_none_or(|s| s == p.store);
        if fits {
            if first {
                self.beginning.get_or_insert(Beginning::Start);
                self.chains += 1;
            }
            self.recovered += 1;
            self.accept(&p, bytes, None);
        }
        fits
    }

    fn accept(&mut self, p: &Parsed<'_>, bytes: &[u8], seal: Option<Seal>) {
        self.chain = Chain { seq: p.seq, head: sha256(bytes) };
        if !self.missing.is_empty() {
            self.missing.retain(|h| *h != self.chain.head);
        }
        self.store = Some(p.store);
        self.records += 1;
        self.lost = self.lost.saturating_add(p.lost.filter(|_| p.event == GAP).unwrap_or(0));
        self.last_time.clear();
        self.last_time.push_str(&p.time);
        self.unsealed += 1;
        if let Some(seal) = seal {
            let file = self.files.saturating_sub(1);
            self.seals.push(Sealed { file, line: self.line, seq: p.seq, seal });
            self.unsealed = 0;
        }
    }
}

#[cfg(test)]
mod tests;
