use super::*;

fn logs(dir: &Path) -> Arc<Logs> {
    Arc::new(Logs::new(dir.join("console.log"), Arc::default()))
}

fn push(logs: &Logs, boot: u64, seq: u64) {
    logs.push(boot, seq, Stream::Stdout, 7, format!("line {boot}.{seq}"));
}

async fn numbers(reader: &mut LogReader, count: usize) -> Vec<u64> {
    let mut numbers = Vec::new();
    while numbers.len() < count {
        match reader.next().await {
            Some(LogItem::Line(line)) => numbers.push(line.number),
            other => panic!("{other:?} after {numbers:?}"),
        }
    }
    numbers
}

#[tokio::test]
async fn lines_are_kept_followed_and_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let logs = logs(dir.path());
    push(&logs, 1, 0);
    push(&logs, 1, 1);
    push(&logs, 1, 1);
    let mut reader = logs.read(1, true).unwrap();
    push(&logs, 1, 2);
    push(&logs, 2, 0);
    assert_eq!(numbers(&mut reader, 3).await, [1, 2, 3]);
    let mut all = logs.read(0, false).unwrap();
    assert_eq!(numbers(&mut all, 4).await, [0, 1, 2, 3]);
    assert_eq!(all.next().await, None);
    drop(logs);
    assert_eq!(reader.next().await, None);
}

#[test]
fn the_next_agent_goes_on_where_this_one_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let first = logs(dir.path());
    assert_eq!(first.wanted_from(3), 0);
    push(&first, 3, 0);
    push(&first, 3, 4);
    assert_eq!(first.metrics.log_lines_lost.get(), 3);
    drop(first);
    std::fs::OpenOptions::new()
        .append(true)
        .open(dir.path().join("console.log"))
        .unwrap()
        .write_all(b"{\"n\":9,\"t\"")
        .unwrap();
    let second = logs(dir.path());
    assert_eq!((second.wanted_from(3), second.wanted_from(4)), (5, 0));
    push(&second, 4, 0);
    assert_eq!(second.last_words(), "line 3.0 | line 3.4 | line 4.0");
}

#[test]
fn a_guest_may_number_its_lines_as_it_likes() {
    let dir = tempfile::tempdir().unwrap();
    let first = logs(dir.path());
    push(&first, 1, 0);
    push(&first, 1, u64::MAX);
    push(&first, 1, u64::MAX);
    assert_eq!(first.wanted_from(1), u64::MAX);
    assert_eq!(first.metrics.log_lines_lost.get(), MOST_LOST);
    // The next agent too.
    let second = logs(dir.path());
    assert_eq!(second.wanted_from(1), u64::MAX);
    push(&second, 2, 0);
    assert_eq!(second.wanted_from(2), 1);
}

#[tokio::test]
async fn a_slow_follower_reads_on_in_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let logs = logs(dir.path());
    let push_many = |seqs: Range<u64>| seqs.for_each(|seq| push(&logs, 1, seq));
    push_many(0..10);
    let mut reader = logs.read(0, true).unwrap();
    push_many(10..1110);
    let mut told = numbers(&mut reader, 500).await;
    // More than it reads at once.
    let all = 1110 + 2 * MAX_READ as u64;
    push_many(1110..all);
    told.extend(numbers(&mut reader, all as usize - 500).await);
    assert!(told.into_iter().eq(0..all));
    push(&logs, 1, all);
    assert_eq!(numbers(&mut reader, 1).await, [all]);
    assert_eq!(logs.metrics.log_lines_missed.get(), 0);
}

#[tokio::test]
async fn a_follower_is_told_what_was_forgotten_before_it_came_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let logs = logs(dir.path());
    let line = "x".repeat(8000);
    let mut reader = logs.read(0, true).unwrap();
    for seq in 0..2000 {
        logs.push(1, seq, Stream::Stdout, 7, line.clone());
    }
    let missed = match reader.next().await {
        Some(LogItem::Dropped(missed)) => missed,
        other => panic!("{other:?}"),
    };
    // As many are kept as fit into one to two files.
    assert!((900..1500).contains(&missed), "{missed}");
    let told = numbers(&mut reader, 2000 - missed as usize).await;
    assert!(told.into_iter().eq(missed..2000));
    assert_eq!(logs.metrics.log_lines_missed.get(), missed);
}

#[test]
fn the_file_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let logs = logs(dir.path());
    let line = "x".repeat(8000);
    for seq in 0..1500 {
        logs.push(1, seq, Stream::Stderr, 0, line.clone());
    }
    let sizes: u64 = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().metadata().unwrap().len())
        .sum();
    assert!(sizes > MAX_FILE && sizes <= 2 * MAX_FILE, "{sizes}");
    assert_eq!(
        logs.read(0, false).unwrap().kept.back().unwrap().number,
        1499
    );
}

#[test]
fn no_line_is_missing_where_a_file_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let logs = logs(dir.path());
    let line = "x".repeat(8000);
    let mut seq = 0;
    let length = || std::fs::metadata(&logs.path).map_or(0, |m| m.len());
    let mut push_until_renamed = || {
        let mut before = 0;
        while length() >= before {
            before = length();
            logs.push(1, seq, Stream::Stdout, 0, line.clone());
            seq += 1;
        }
    };
    push_until_renamed();
    push_until_renamed();
    let files = logs.open_kept(&logs.inner.lock(), MAX_FILE).unwrap();
    push_until_renamed();
    let read = last_lines(files, 0).unwrap();
    assert!(read.len() > 500, "{} lines", read.len());
    assert_without_gap(&read);
}

#[test]
fn no_line_is_missing_while_others_come() {
    let dir = tempfile::tempdir().unwrap();
    let logs = logs(dir.path());
    std::thread::scope(|threads| {
        // Some ten files.
        let writer = threads.spawn(|| {
            let line = "x".repeat(8000);
            for seq in 0..5000 {
                logs.push(1, seq, Stream::Stdout, 0, line.clone());
            }
        });
        while !writer.is_finished() {
            assert_without_gap(&logs.read(0, false).unwrap().kept);
        }
    });
}

fn assert_without_gap(lines: &VecDeque<LogLine>) {
    let numbers: Vec<u64> = lines.iter().map(|line| line.number).collect();
    for pair in numbers.windows(2) {
        assert_eq!(pair[0] + 1, pair[1], "of {} lines", numbers.len());
    }
}

#[test]
fn last_words_are_the_end_of_both_files() {
    let dir = tempfile::tempdir().unwrap();
    let logs = logs(dir.path());
    let escapes = "\x1b[2J".repeat(2000);
    for seq in 0..300 {
        logs.push(1, seq, Stream::Stdout, 0, escapes.clone());
    }
    std::fs::rename(&logs.path, previous(&logs.path)).unwrap();
    logs.inner.lock().file = None;
    push(&logs, 1, 300);
    let words = logs.last_words();
    assert!(words.ends_with("[2J | line 1.300"), "{words}");
    assert!(words.len() < 3000 && !words.contains('\x1b'));
}
