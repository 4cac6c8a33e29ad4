//! What the shell knows of one subscription, beside its flow: how its database is told of, and who reads it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::couch::local_docs::Life;
use crate::error::Result;
use crate::pipeline::Shared;
use crate::pipeline::complaints::Complaint;
use crate::pipeline::feed_reader::{Reader, Reading};
use crate::pure::checkpoint::Mark;
use crate::pure::flow::Read;
use crate::pure::message::Telling;
use crate::sys::Thread;

/// One webhook on one database.
pub(crate) struct Subscription {
    /// How its database is told of; its name, too.
    pub(crate) telling: Arc<Telling>,
    /// The mark it bears, as far as is known.
    pub(crate) mark: Option<Mark>,
    /// 1.x: the server's life when it was opened.
    pub(crate) life: Option<Life>,
    /// The last seek, which its checkpoints name.
    pub(crate) seek: Option<String>,
    /// What was said of its feed.
    pub(crate) complaint: Complaint,
    /// Answers cut off since a request last ended as it should.
    pub(crate) n_cuts: u32,
    hands: Hands,
}

/// Who reads it.
enum Hands {
    /// A thread of its own.
    Own(Reader),
    /// Whoever of the pool is free; `None` while one is at it.
    Pool { reading: Option<Box<Reading>>, stopping: Arc<AtomicBool> },
}

impl Subscription {
    /// With a thread of its own, which may wait for changes. `mark` as far as it is known.
    ///
    /// # Errors
    /// `Io` when no thread can be started.
    pub(crate) fn named(reading: Reading, mark: Option<Mark>) -> Result<Subscription> {
        let (telling, seek) = (reading.telling(), reading.seek());
        Ok(Subscription::new(telling, mark, seek, Hands::Own(Reader::start(reading)?)))
    }

    /// Read by the pool, page by page.
    pub(crate) fn pooled(reading: Reading, mark: Option<Mark>) -> Subscription {
        let reading = reading.of_many();
        let (telling, seek, stopping) = (reading.telling(), reading.seek(), reading.stopping());
        Subscription::new(telling, mark, seek, Hands::Pool { reading: Some(Box::new(reading)), stopping })
    }

    fn new(telling: Arc<Telling>, mark: Option<Mark>, seek: Option<String>, hands: Hands) -> Subscription {
        let complaint = Complaint::default();
        Subscription { telling, mark, life: None, seek, complaint, n_cuts: 0, hands }
    }

    /// Name of the database.
    pub(crate) fn db(&self) -> &str {
        &self.telling.db
    }

    /// Whether it has no thread of its own.
    pub(crate) fn is_pooled(&self) -> bool {
        matches!(self.hands, Hands::Pool { .. })
    }

    /// Orders one reading; never waits.
    ///
    /// # Errors
    /// As [`crate::pipeline::reader_pool::ReaderPool::give`].
    pub(crate) fn read(&mut self, shared: &Shared, read: Read) -> Result<()> {
        let known = if read == Read::Open { self.mark } else { None };
        match &mut self.hands {
            Hands::Own(reader) => {
                reader.read(read, known);
                Ok(())
            }
            Hands::Pool { reading, .. } => {
                let reading = reading.take().expect("a flow orders one reading at a time");
                shared.pool.give(reading, read, known)
            }
        }
    }

    /// What was lent to the pool.
    pub(crate) fn take_back(&mut self, lent: Box<Reading>) {
        if let Hands::Pool { reading, .. } = &mut self.hands {
            *reading = Some(lent);
        }
    }

    /// Ends what is being read. The pool's pages are short and end by themselves.
    pub(crate) fn close(&self) {
        match &self.hands {
            Hands::Own(reader) => reader.close(),
            Hands::Pool { .. } => {}
        }
    }

    /// Ends its thread as soon as that can be woken.
    pub(crate) fn stop(self) -> Option<Thread> {
        match self.hands {
            Hands::Own(reader) => Some(reader.stop()),
            Hands::Pool { stopping, .. } => {
                stopping.store(true, Ordering::SeqCst);
                None
            }
        }
    }
}
