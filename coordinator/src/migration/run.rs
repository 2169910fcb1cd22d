//! The shell around the machine: carries out its actions, in order, and feeds back what came of them.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::act::{StepError, World, forward};
use super::journal::{Journal, Record};
use super::machine::{Action, Entry, Event, Machine, Outcome};
use super::plan::Mission;
use super::steps::{NO_RETURN, Step, Undo};
use super::undo::undo;
use crate::client::Switch;
use crate::exit::{Code, Failure};
use crate::nearest::hint;
use crate::progress::Progress;

/// How it ended, and what a person should know about it.
pub struct Ended {
    /// Of the machine.
    pub outcome: Outcome,
    /// What failed, in order.
    pub troubles: Vec<String>,
    /// Why it failed first, if it did: decides the exit code when nothing was done.
    pub cause: Option<Failure>,
    /// VMs that have died on the source.
    pub died: BTreeSet<String>,
}

/// For tests: `GANGWAY_PAUSE_AT` and `GANGWAY_FAIL_AT`, each `STEP` (before it acts) or `STEP:after`.
#[derive(Debug, Clone, Default)]
pub struct Interference {
    pause: Option<Point>,
    fail: Option<Point>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Point {
    step: Step,
    after: bool,
}

impl Interference {
    /// From the environment.
    pub fn from_env() -> Result<Interference, Failure> {
        let point = |key: &str| {
            let Ok(value) = std::env::var(key) else {
                return Ok(None);
            };
            let (name, after) = match value.split_once(':') {
                Some((name, "after")) => (name, true),
                Some(_) => ("", false),
                None => (value.as_str(), false),
            };
            match Step::named(name) {
                Some(step) => Ok(Some(Point { step, after })),
                None => Err(Failure::usage(format!(
                    "{key}='{value}' is not STEP or STEP:after"
                ))),
            }
        };
        Ok(Interference {
            pause: point("GANGWAY_PAUSE_AT")?,
            fail: point("GANGWAY_FAIL_AT")?,
        })
    }

    /// Waits for the file `go` in the migration's folder, if this is the place; then fails, if this is the place.
    async fn at(&self, step: Step, after: bool, attempt: u32, dir: &Path) -> Result<(), StepError> {
        let here = Some(Point { step, after });
        if self.pause == here && attempt == 0 {
            // A test that can't see the mark will run into its own time-out.
            let _ = std::fs::write(dir.join("paused"), step.name());
            while !dir.join("go").exists() {
                sleep(Duration::from_millis(20)).await;
            }
        }
        if self.fail == here && attempt == 0 {
            return Err(StepError::Internal(format!(
                "failed on purpose at {}",
                step.name()
            )));
        }
        Ok(())
    }
}

enum News {
    Machine(Event, Option<(Failure, String)>),
    AbortAsked,
}

struct Shell {
    world: Arc<World>,
    journal: Journal,
    dir: PathBuf,
    interference: Interference,
    progress: Progress,
    tx: mpsc::UnboundedSender<News>,
    running: HashMap<Step, JoinHandle<()>>,
    ended: Option<Outcome>,
    troubles: Vec<String>,
    cause: Option<Failure>,
}

/// Walks the machine to its end. `first` is what it has already asked for (after a crash), else empty; `remarks`: what is to be told, and noted,
/// before.
pub async fn drive(
    world: Arc<World>,
    journal: Journal,
    mut machine: Machine,
    first: Vec<Action>,
    remarks: &[String],
    interference: Interference,
    progress: Progress,
) -> Result<(Ended, Journal), Failure> {
    let (tx, mut rx) = mpsc::unbounded_channel();
    let dir = journal.dir().to_owned();
    let watcher = tokio::spawn(watch_abort(dir.clone(), tx.clone()));
    let mut shell = Shell {
        world,
        journal,
        dir,
        interference,
        progress,
        tx,
        running: HashMap::new(),
        ended: None,
        troubles: Vec::new(),
        cause: None,
    };
    for text in remarks {
        shell.note(text.clone());
    }
    let mut actions = VecDeque::from(first);
    if actions.is_empty() && machine.outcome().is_none() {
        actions.extend(machine.on(Event::Start));
    }
    loop {
        while let Some(action) = actions.pop_front() {
            if let Err(f) = shell.act(action).await {
                // Without its journal nothing may go on, except what puts things back.
                shell.troubles.push(f.message.clone());
                if machine.past_return() || shell.cause.is_some() {
                    return Err(f);
                }
                shell.cause = Some(f);
                actions.clear();
                actions.extend(machine.on(Event::Abort));
            }
        }
        if let Some(outcome) = shell.ended {
            watcher.abort();
            shell.progress.finish().await;
            let ended = Ended {
                outcome,
                troubles: shell.troubles,
                cause: shell.cause,
                died: shell.world.facts().died.clone(),
            };
            return Ok((ended, shell.journal));
        }
        match rx.recv().await {
            Some(News::Machine(event, why)) => {
                if let Some((failure, text)) = why {
                    shell.note(text);
                    shell.cause.get_or_insert(failure);
                }
                actions.extend(machine.on(event));
            }
            Some(News::AbortAsked) => {
                if !machine.past_return() {
                    shell.note("abort asked for".to_owned());
                    shell
                        .cause
                        .get_or_insert(Failure::new(Code::RolledBack, "aborted by the operator"));
                }
                actions.extend(machine.on(Event::Abort));
            }
            // The shell itself holds a sender.
            None => return Err(Failure::failed("internal: the event channel closed")),
        }
    }
}

async fn watch_abort(dir: PathBuf, tx: mpsc::UnboundedSender<News>) {
    let file = async {
        while !Journal::abort_asked(&dir) {
            sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = file => {}
        _ = tokio::signal::ctrl_c() => {}
        () = terminated() => {}
    }
    let _ = tx.send(News::AbortAsked);
}

async fn terminated() {
    match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        Ok(mut s) => drop(s.recv().await),
        Err(_) => std::future::pending().await,
    }
}

impl Shell {
    /// Says what went wrong, once: a step that is tried again fails for the same reason many times.
    fn note(&mut self, text: String) {
        if self.troubles.contains(&text) {
            return;
        }
        self.progress.line(&text);
        // The trouble itself must not be hidden by a journal that cannot be written.
        let _ = self.journal.append(Record::Trouble(text.clone()), false);
        self.troubles.push(text);
    }

    async fn act(&mut self, action: Action) -> Result<(), Failure> {
        match action {
            Action::Journal { entry, sync } => self.write(entry, sync),
            Action::Run { step, attempt } => {
                self.run(step, attempt);
                Ok(())
            }
            Action::Halt(step) => {
                if let Some(task) = self.running.remove(&step) {
                    task.abort();
                    // Cancelled, or it had just ended: either way it has let go.
                    let _ = task.await;
                }
                self.send(Event::Halted(step));
                Ok(())
            }
            Action::Undo {
                undo: what,
                attempt,
            } => {
                self.put_back(what, attempt);
                Ok(())
            }
            Action::TooLate => {
                self.progress.line("too late for an abort: the group has passed the point of no return and goes on");
                Ok(())
            }
            Action::End(outcome) => {
                self.ended = Some(outcome);
                self.world.disconnect().await;
                Ok(())
            }
        }
    }

    fn write(&mut self, entry: Entry, sync: bool) -> Result<(), Failure> {
        match entry {
            Entry::Begin(step) => self.progress.step_begins(step),
            Entry::Done(step) => {
                self.progress.step_done(step);
                let facts = Box::new(self.world.facts().clone());
                self.journal.append(Record::Facts(facts), false)?;
            }
            Entry::Rollback => self.progress.line("putting everything back"),
            Entry::Undone(u) => self.progress.line(&format!("undone: {}", u.text())),
            Entry::NotUndone(u) => self.progress.line(&format!("NOT undone: {}", u.text())),
            Entry::End(_) => {
                let facts = Box::new(self.world.facts().clone());
                self.journal.append(Record::Facts(facts), false)?;
            }
            Entry::Failed(_) => {}
        }
        self.journal.append(Record::Step(entry), sync)
    }

    fn send(&self, event: Event) {
        // The receiver lives as long as the shell.
        let _ = self.tx.send(News::Machine(event, None));
    }

    fn run(&mut self, step: Step, attempt: u32) {
        let (world, tx) = (self.world.clone(), self.tx.clone());
        let (interference, dir) = (self.interference.clone(), self.dir.clone());
        let task = tokio::spawn(async move {
            sleep(backoff(attempt)).await;
            let work = async {
                interference.at(step, false, attempt, &dir).await?;
                forward(&world, step).await?;
                interference.at(step, true, attempt, &dir).await
            };
            let news = match work.await {
                Ok(()) => News::Machine(Event::Done(step), None),
                Err(e) => {
                    let text = format!("{}: {e}", step.name());
                    let failure = failure(e, &text);
                    let unchanged = failure.1;
                    News::Machine(Event::Failed { step, unchanged }, Some((failure.0, text)))
                }
            };
            let _ = tx.send(news);
        });
        self.running.insert(step, task);
    }

    fn put_back(&mut self, what: Undo, attempt: u32) {
        let (world, tx) = (self.world.clone(), self.tx.clone());
        tokio::spawn(async move {
            sleep(backoff(attempt)).await;
            if attempt > 0 || what == Undo::CancelMemory {
                // A halted step may have left a command half-way on its connection.
                world.disconnect().await;
            }
            let news = match undo(&world, what).await {
                Ok(()) => News::Machine(Event::Undone(what), None),
                Err(errors) => {
                    let text = format!("{}: {}", what.text(), errors.join("; "));
                    News::Machine(
                        Event::UndoFailed(what),
                        Some((Failure::failed(text.clone()), text)),
                    )
                }
            };
            let _ = tx.send(news);
        });
    }
}

/// The failure for the shell, and whether the step certainly had no effect.
fn failure(e: StepError, text: &str) -> (Failure, bool) {
    let unchanged = e.unchanged();
    let code = match e {
        StepError::Check(f) => return (f, unchanged),
        StepError::Switch(e) => Failure::from(e).code,
        _ => Code::Failed,
    };
    (Failure::new(code, text), unchanged)
}

fn backoff(attempt: u32) -> Duration {
    match attempt {
        0 => Duration::ZERO,
        n => Duration::from_millis((50 << n.min(6)).min(2000)),
    }
}

/// What must be true before anything is touched. Also run by `--dry-run`.
pub async fn check(mission: &Mission, source: &Switch, target: &Switch) -> Result<(), Failure> {
    let (src_vms, dst_vms, src_ports, dst_ports, dst_host, src_host) = tokio::join!(
        source.vms(),
        target.vms(),
        source.ports(),
        target.ports(),
        target.host_show(),
        source.host_show()
    );
    let (src_vms, dst_vms, src_ports, dst_ports) = (src_vms?, dst_vms?, src_ports?, dst_ports?);
    let (dst_host, src_host) = (dst_host?, src_host?);
    let (from, to) = (&mission.from, &mission.to);
    if dst_host.version != src_host.version {
        tracing::info!(source = %src_host.version, target = %dst_host.version, "the switches are of different releases");
    }
    if dst_host.migration_address.is_empty() {
        return Err(Failure::usage(format!(
            "host '{to}' cannot take VMs: set [migration] address in its switch's configuration"
        )));
    }
    for vm in mission.vms() {
        let Some(s) = src_vms.iter().find(|v| v.name == *vm) else {
            let hint = hint(vm, src_vms.iter().map(|v| v.name.as_str()));
            return Err(Failure::usage(format!(
                "host '{from}' knows no VM '{vm}'{hint}"
            )));
        };
        if s.status != "running" {
            return Err(Failure::refused(format!(
                "VM '{vm}' on host '{from}' is '{}', not running; only running VMs are moved",
                s.status
            )));
        }
        let Some(d) = dst_vms.iter().find(|v| v.name == *vm) else {
            return Err(Failure::usage(format!(
                "host '{to}' has no VM '{vm}': add [[vm]] name = \"{vm}\" and its ports to its switch's configuration"
            )));
        };
        if d.reachable {
            return Err(Failure::refused(format!(
                "VM '{vm}' is already there on host '{to}' ({}); end it first",
                d.status
            )));
        }
        if !d.can_arrive {
            return Err(Failure::usage(format!(
                "VM '{vm}' cannot arrive on host '{to}': its switch's configuration has no 'incoming' command for it"
            )));
        }
    }
    for port in &mission.ports {
        let vm = &port.vm;
        let source_kind = src_ports
            .iter()
            .find(|p| p.name == port.name)
            .map(|p| p.kind.as_str());
        match dst_ports.iter().find(|p| p.name == port.name) {
            None => {
                return Err(Failure::usage(format!(
                    "host '{to}' has no port '{}' for VM '{vm}': add it to its switch's configuration",
                    port.name
                )));
            }
            Some(p) if p.vm.as_deref() != Some(vm) => {
                return Err(Failure::usage(format!(
                    "port '{}' belongs to VM '{vm}' on host '{from}', but to {} on host '{to}'",
                    port.name,
                    p.vm.as_ref()
                        .map_or("none".to_owned(), |v| format!("VM '{v}'"))
                )));
            }
            Some(p) if p.mac.is_some() && port.mac.is_some() && p.mac != port.mac => {
                return Err(Failure::usage(format!(
                    "port '{}' has another MAC on host '{to}' than on host '{from}'; make them equal",
                    port.name
                )));
            }
            Some(p) if source_kind.is_some_and(|k| k != p.kind) => {
                return Err(Failure::usage(format!(
                    "port '{}' is {} on host '{from}' and {} on host '{to}'; make them equal",
                    port.name,
                    source_kind.unwrap_or_default(),
                    p.kind
                )));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// The exit code and the last line for an ended migration.
pub fn verdict(mission: &Mission, ended: &Ended) -> Result<(), Failure> {
    let id = mission.id;
    let cause = ended.cause.as_ref().map_or("", |f| f.message.as_str());
    match ended.outcome {
        Outcome::Moved => Ok(()),
        Outcome::NothingDone => Err(match &ended.cause {
            Some(f) => f.clone(),
            None => Failure::new(Code::RolledBack, "aborted before anything was done"),
        }),
        Outcome::RolledBack => Err(Failure::new(
            Code::RolledBack,
            format!(
                "migration {id} was rolled back, {} run on '{}': {cause}",
                match ended.died.iter().cloned().collect::<Vec<_>>().join(", ") {
                    none if none.is_empty() => "all VMs".to_owned(),
                    died => format!("all VMs but {died}, whose QEMU has ended there,"),
                },
                mission.from
            ),
        )),
        Outcome::RollbackIncomplete => Err(Failure::failed(format!(
            "migration {id} was rolled back, but not everything could be put back ({}); `gangway abort {id}` tries again",
            ended.troubles.join("; ")
        ))),
        Outcome::Unfinished => Err(Failure::new(
            Code::Unfinished,
            format!(
                "migration {id} is past '{}' and not finished: {}; `gangway abort {id}` goes on with it",
                NO_RETURN.name(),
                ended.troubles.last().map_or("", String::as_str)
            ),
        )),
    }
}
