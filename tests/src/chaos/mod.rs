//! Faults at every step of a migration, on the real lab: three VMs under numbered traffic, one fault, then what a user would
//! do, then the judgement.
//!
//! A [`Case`] is a step of the product's own table (`gangway migrate --dry-run` names them) and a [`Fault`]. The coordinator
//! waits at the step (`GANGWAY_PAUSE_AT`, its only hook; `GANGWAY_FAIL_AT` for the step that fails), the fault strikes, the
//! coordinator goes on. Unless the case says `STEP:before`, that is when the step has taken effect and the journal does not know.
//!
//! [`run`] carries a case out, [`rule`] says what each fault may cost (pure), [`book`] keeps results and writes
//! docs/reliability.md.
//!
//! Invariant: a verdict is made of counts from both ends after the senders have stopped, of what the coordinator's `status`
//! says, of what every QEMU says, and of what both switches still hold.
//! Invariant: what a case may cost is written in [`rule`] before it runs; everything else is a red row.

pub mod book;
pub mod rule;
pub mod run;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Stands where a step stands in a case without a migration: a switch is killed under VMs that run on it.
pub const NO_MIGRATION: &str = "no-migration";

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// The step says that it failed.
    Fail,
    /// `kill -9` of the coordinator; a user comes half a second later.
    KillCoordinator,
    /// `kill -9` of A's switch; its supervisor starts it again after 200 ms, as deploy/systemd says.
    KillSourceSwitch,
    /// The same at B.
    KillTargetSwitch,
    /// A's switch is stopped in good order and started again, as by `systemctl restart`.
    RestartSourceSwitch,
    /// `kill -9` of the consumer's QEMU at A.
    KillSourceQemu,
    /// The same at B.
    KillTargetQemu,
    /// Host B's management link is dead for 3 s.
    #[serde(rename = "cut-3s")]
    CutShort,
    /// It is dead for 20 s: longer than any connection lives without an answer.
    #[serde(rename = "cut-20s")]
    CutLong,
    /// The disk of A's spool is full, until the migration has ended.
    SourceDiskFull,
    /// The same at B.
    TargetDiskFull,
}

impl Fault {
    /// All.
    pub const ALL: [Fault; 11] = [
        Fault::Fail,
        Fault::KillCoordinator,
        Fault::KillSourceSwitch,
        Fault::KillTargetSwitch,
        Fault::RestartSourceSwitch,
        Fault::KillSourceQemu,
        Fault::KillTargetQemu,
        Fault::CutShort,
        Fault::CutLong,
        Fault::SourceDiskFull,
        Fault::TargetDiskFull,
    ];

    /// As in `CASE=`.
    pub fn name(self) -> &'static str {
        match self {
            Fault::Fail => "fail",
            Fault::KillCoordinator => "kill-coordinator",
            Fault::KillSourceSwitch => "kill-source-switch",
            Fault::KillTargetSwitch => "kill-target-switch",
            Fault::RestartSourceSwitch => "restart-source-switch",
            Fault::KillSourceQemu => "kill-source-qemu",
            Fault::KillTargetQemu => "kill-target-qemu",
            Fault::CutShort => "cut-3s",
            Fault::CutLong => "cut-20s",
            Fault::SourceDiskFull => "source-disk-full",
            Fault::TargetDiskFull => "target-disk-full",
        }
    }

    /// Whether there is something to hit at this step: B's QEMUs are there once they were started, A's until they are ended.
    pub fn can_hit(self, step: &str, steps: &[String]) -> bool {
        let at = |name: &str| steps.iter().position(|s| s == name);
        match self {
            Fault::RestartSourceSwitch => step == NO_MIGRATION,
            _ if step == NO_MIGRATION => self == Fault::KillSourceSwitch,
            Fault::KillTargetQemu => at(step) >= at("start"),
            Fault::KillSourceQemu => at(step) < at("retire"),
            _ => true,
        }
    }
}

/// A fault at a step.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Case {
    /// The step's name.
    pub step: String,
    /// It strikes before the step acts; else when the step has taken effect and the journal does not know.
    pub before: bool,
    /// What goes wrong.
    pub fault: Fault,
}

impl Case {
    /// The coordinator's word for the moment.
    pub fn point(&self) -> String {
        match self.before {
            true => self.step.clone(),
            false => format!("{}:after", self.step),
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let before = if self.before { ":before" } else { "" };
        write!(f, "{}{before} {}", self.step, self.fault.name())
    }
}

/// What `CASE=` says: a step, a fault, or both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    step: Option<(String, bool)>,
    fault: Option<Fault>,
}

impl FromStr for Wish {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut wish = Wish::default();
        for word in text.split_whitespace() {
            if let Some(fault) = Fault::ALL.into_iter().find(|f| f.name() == word) {
                wish.fault = Some(fault);
                continue;
            }
            let (step, before) = match word.split_once(':') {
                Some((step, "before")) => (step, true),
                Some((step, "after")) => (step, false),
                None => (word, false),
                Some(_) => bail!("{word:?} is not STEP, STEP:before or STEP:after"),
            };
            if wish.step.replace((step.to_owned(), before)).is_some() {
                bail!("{text:?} names two steps, or a fault that there is not");
            }
        }
        Ok(wish)
    }
}

/// The cases that are wished for, step by step in the table's order; none wished for is all.
pub fn cases(wishes: &[Wish], steps: &[String]) -> Result<Vec<Case>> {
    let all = [Wish::default()];
    let wishes = if wishes.is_empty() { &all } else { wishes };
    let mut cases = Vec::new();
    for wish in wishes {
        if let Some((step, _)) = &wish.step {
            let known = steps.contains(step).then_some(());
            known.with_context(|| {
                let faults = Fault::ALL.map(Fault::name).join(", ");
                format!(
                    "{step:?} is no step ({}) and no fault ({faults})",
                    steps.join(", ")
                )
            })?;
        }
        for step in steps {
            for fault in Fault::ALL {
                let (wanted, before) = match &wish.step {
                    Some((wanted, before)) => (wanted == step, *before),
                    None => (true, false),
                };
                let wanted = wanted && wish.fault.is_none_or(|f| f == fault);
                let case = Case {
                    step: step.clone(),
                    before,
                    fault,
                };
                if wanted && fault.can_hit(step, steps) && !cases.contains(&case) {
                    cases.push(case);
                }
            }
        }
    }
    Ok(cases)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps() -> Vec<String> {
        ["check", "start", "stop", "retire", "release"]
            .map(String::from)
            .to_vec()
    }

    fn told(wishes: &[&str]) -> Vec<String> {
        let wishes: Vec<Wish> = wishes.iter().map(|w| w.parse().unwrap()).collect();
        let cases = cases(&wishes, &steps()).unwrap();
        cases.iter().map(Case::to_string).collect()
    }

    #[test]
    fn a_case_is_a_step_a_fault_or_both() {
        assert_eq!(told(&["stop kill-source-qemu"]), ["stop kill-source-qemu"]);
        assert_eq!(told(&["stop:before fail"]), ["stop:before fail"]);
        // A restart in good order is for VMs that stay.
        assert_eq!(told(&["stop"]).len(), Fault::ALL.len() - 1);
        assert!(Fault::RestartSourceSwitch.can_hit(NO_MIGRATION, &steps()));
        assert_eq!(told(&["fail"]).len(), steps().len());
        assert_eq!(told(&["stop", "stop fail"]).len(), Fault::ALL.len() - 1);
    }

    #[test]
    fn no_process_is_killed_that_is_not_there() {
        assert!(!told(&[]).contains(&"check kill-target-qemu".to_owned()));
        assert!(!told(&[]).contains(&"release kill-source-qemu".to_owned()));
        assert_eq!(told(&[]).len(), steps().len() * (Fault::ALL.len() - 1) - 3);
    }

    #[test]
    fn nonsense_is_named() {
        assert!("stop fial".parse::<Wish>().is_err());
        assert!("stop:now".parse::<Wish>().is_err());
        let wish = "freez fail".parse().unwrap();
        let error = cases(&[wish], &steps()).unwrap_err().to_string();
        assert!(error.contains("freez"), "{error}");
    }
}
