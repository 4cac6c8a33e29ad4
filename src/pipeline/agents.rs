//! The HTTP agents of one endpoint: one for each request that is open, each with one connection.
//!
//! `ureq`'s agent counts and compares all its idle connections twice a request: with 16 of them that was more work than
//! to build the request. Guarantees that all agents share their connector, so that TLS is set up once, and that after
//! `shut_down` nothing is sent: requests under way end, later ones fail.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ureq::Agent;
use ureq::config::Config;

use crate::names::Names;
use crate::socket::Sockets;

/// Makes and lends agents.
#[derive(Debug)]
pub struct Agents {
    config: Config,
    names: Names,
    connector: Sockets,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    all: Vec<Agent>,
    /// Last used, first lent: what is not needed grows old and is closed.
    idle: Vec<Agent>,
    is_shut: bool,
}

impl Agents {
    /// None yet.
    pub fn new(config: Config, names: Names, connector: Sockets) -> Agents {
        Agents { config, names, connector, state: Mutex::default() }
    }

    /// Lends an agent for one request; whoever panics with it keeps it.
    pub fn lend<T>(&self, request: impl FnOnce(&Agent) -> T) -> T {
        let idle = self.state().idle.pop();
        let agent = idle.unwrap_or_else(|| self.make());
        let result = request(&agent);
        self.state().idle.push(agent);
        result
    }

    /// Ends every request under way and refuses later ones.
    pub fn shut_down(&self) {
        let mut state = self.state();
        state.is_shut = true;
        state.all.iter().cloned().for_each(Agent::shutdown);
    }

    fn make(&self) -> Agent {
        let agent = Agent::with_parts(self.config.clone(), self.connector.clone(), self.names.clone());
        let mut state = self.state();
        if state.is_shut {
            agent.clone().shutdown();
        }
        state.all.push(agent.clone());
        agent
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::pure::guard::Guard;
    use crate::socket::Gate;
    use crate::standin::receiver::{Receiver, ReceiverOptions};

    #[test]
    fn nothing_is_sent_while_the_gate_is_shut() {
        let receiver = Receiver::start(ReceiverOptions::new(Vec::new())).unwrap();
        let open = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&open);
        let sockets = Sockets::gated(Gate(Arc::new(move || asked.load(Ordering::SeqCst))));
        let config = Agent::config_builder().http_status_as_error(false).proxy(None).build();
        let agents = Agents::new(config, Names::guarded(Guard::default()), sockets);
        let send = || agents.lend(|agent| agent.post(receiver.url()).send("{}").map(drop));
        let is_refused = |sent: Result<(), ureq::Error>| matches!(sent, Err(ureq::Error::Io(error)) if error.kind() == ErrorKind::PermissionDenied);
        assert!(is_refused(send()), "over a new connection");
        open.store(true, Ordering::SeqCst);
        send().unwrap();
        open.store(false, Ordering::SeqCst);
        assert!(is_refused(send()), "over a pooled one");
        open.store(true, Ordering::SeqCst);
        send().unwrap();
        assert_eq!(receiver.look(|record| record.deliveries().len()), 2);
    }
}
