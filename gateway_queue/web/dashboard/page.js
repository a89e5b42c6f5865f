"use strict";

const DEAF_MS = 5000; // events come every second, so the connection is lost
const RETRY_MS = 2000;
const TICK_MS = 100;
const TITLE = document.title;

let skew = 0; // what to add to this machine's clock to get the server's, in ms

/** Write a time of some length, as the server does. */
function duration(seconds, decimals = 0) {
  if (seconds < 60) {
    return `${(Math.floor(seconds * 10 ** decimals) / 10 ** decimals).toFixed(decimals)} s`;
  }
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) {
    return `${minutes}:${String(Math.floor(seconds) % 60).padStart(2, "0")} min`;
  }
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function now() {
  return (Date.now() + skew) / 1000;
}

/** Fill in what changes with the time. */
function tick(root) {
  for (const each of root.querySelectorAll("[data-until]")) {
    write(each, duration(Math.max(0, each.dataset.until - now()), 1));
  }
  for (const each of root.querySelectorAll("[data-since]")) {
    write(each, duration(Math.max(0, now() - each.dataset.since)));
  }
}

/** Write times of day in the reader's zone. */
function localise(root) {
  const clock = { hour: "2-digit", minute: "2-digit", second: "2-digit" };
  const today = new Intl.DateTimeFormat([], clock);
  const otherDay = new Intl.DateTimeFormat([], { weekday: "short", ...clock });
  const date = new Date(now() * 1000).toDateString();
  for (const each of root.querySelectorAll("time")) {
    const at = new Date(each.dateTime);
    write(each, (at.toDateString() === date ? today : otherDay).format(at));
  }
}

/** Let the timelines move on from where they were when the snapshot was taken. */
function drift() {
  const live = document.getElementById("live");
  const passed = now() - live.dataset.now;
  for (const each of live.querySelectorAll("[data-drift]")) {
    each.setAttribute("transform", `translate(${-passed.toFixed(2)} 0)`);
  }
}

/**
 * Change a tree into another, node by node, so that focus, selection and what has been opened stay.
 * Elements that come and go have ids, so that none is taken for another; their order never changes.
 */
function change(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name, value } of fresh.attributes) {
    if (name !== "open" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  for (const each of [...old.children]) {
    if (each.id && !fresh.querySelector(`#${each.id}`)) each.remove();
  }
  old.normalize(); // the texts around what has gone are one in the other tree
  let next = old.firstChild;
  for (const wanted of [...fresh.childNodes]) {
    if (next && next.nodeName === wanted.nodeName && (next.id ?? "") === (wanted.id ?? "")) {
      change(next, wanted);
      next = next.nextSibling;
    } else {
      old.insertBefore(wanted, next);
    }
  }
  while (next) {
    const superfluous = next;
    next = next.nextSibling;
    superfluous.remove();
  }
}

function show(html) {
  const fresh = document.createElement("template");
  fresh.innerHTML = html;
  const live = document.getElementById("live");
  const wanted = fresh.content.firstElementChild;
  if (wanted.dataset.build !== live.dataset.build) {
    location.reload(); // the server has another version of this page by now
    return;
  }
  skew = wanted.dataset.now * 1000 - Date.now();
  localise(fresh.content);
  tick(fresh.content);
  change(live, wanted);
  drift();
  document.title = live.dataset.waiting === "0" ? TITLE : `(${live.dataset.waiting}) ${TITLE}`;
}

function say(text, good) {
  const connection = document.getElementById("connection");
  connection.hidden = false;
  connection.classList.toggle("bad", !good);
  write(connection, text);
}

/** Listen, and begin anew when that has come to its end. */
function listen() {
  const events = new EventSource(`/events${location.search}`);
  let heardAt = performance.now();
  events.onmessage = ({ data }) => {
    heardAt = performance.now();
    show(data);
    say("Live", true);
  };
  events.onerror = () => say("Connection lost, trying again", false);
  const watch = setInterval(() => {
    const lost = performance.now() - heardAt > DEAF_MS;
    if (lost) events.onerror();
    // A browser tries again by itself, unless an answer came that is none.
    if (lost || events.readyState === EventSource.CLOSED) {
      clearInterval(watch);
      events.close();
      listen();
    }
  }, RETRY_MS);
}

const start = document.getElementById("live");
skew = start.dataset.now * 1000 - Date.now();
localise(document);
setInterval(() => {
  if (document.hidden) return;
  tick(document);
  drift();
}, TICK_MS);
listen();
