
"use strict";
// One state (percent kept, layer, head); every change recounts from the stored bits or ranks and redraws in one frame.
const LEVELS = 8, BINS = 10, BLOCK_LEN = 250;
const data = JSON.parse(document.getElementById("data").textContent);
const { texts, length, heads, layers } = data;
const numHeads = layers.length * heads, numPairs = numHeads * length;
const bits = decode(data.bits);
const ranks = data.ranks ? decode(data.ranks) : null;
const tokenSteps = data.tokenSteps ? new Uint16Array(decode(data.tokenSteps).buffer) : null;
const headSteps = data.headSteps ? new Uint32Array(decode(data.headSteps).buffer) : null;
const stored = Math.min(100, Math.max(1, Math.round(100 * data.stored)));
const canSlide = numHeads > 0 && Boolean(ranks || tokenSteps), canFilter = numHeads > 0 && !tokenSteps;
const state = { percent: stored, layer: -1, head: -1 };
const allTokens = new Uint16Array(length), shownTokens = new Uint16Array(length), headCounts = new Uint32Array(numHeads);
const $ = (id) => document.getElementById(id);

function decode(base64) {
  const raw = atob(base64), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}
function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}
const format = new Intl.NumberFormat("en", { maximumFractionDigits: 0 }), number = (n) => format.format(n);
const share1 = (share) => (100 * share).toFixed(1) + "\u00a0%";
const level = (share) => (share <= 0 ? 0 : Math.min(LEVELS, Math.ceil(share * LEVELS - 1e-9)));
function label(share) {
  if (share > 0 && share < 0.005) return "<1";
  return String(share < 1 ? Math.min(99, Math.round(100 * share)) : 100);
}
function size(nbytes) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (nbytes >= 1024 && unit < 3) { nbytes /= 1024; unit++; }
  return nbytes.toFixed(unit === 0 ? 0 : unit === 3 ? 2 : 1) + "\u00a0" + units[unit];
}

// ---- counting -------------------------------------------------------------------------------------------------------
const lowestRank = (percent) => Math.ceil(256 * (100 - percent) / 100);

/** Adds the pairs that one head keeps to `out` [length]; returns how many they are. */
function addHead(row, percent, out) {
  const start = row * length;
  let total = 0;
  if (percent === stored) {
    for (let t = 0, i = start; t < length; t++, i++) if (bits[i >> 3] >> (i & 7) & 1) { out[t]++; total++; }
  } else {
    const lowest = lowestRank(percent);
    for (let t = 0, i = start; t < length; t++, i++) if (ranks[i] >= lowest) { out[t]++; total++; }
  }
  return total;
}
const isShown = (row) => (state.layer < 0 || Math.floor(row / heads) === state.layer) && (state.head < 0 || row % heads === state.head);
const isFiltered = () => state.layer >= 0 || state.head >= 0;

function countAll() {
  const step = tokenSteps && state.percent !== stored ? data.steps.indexOf(state.percent) : -1;
  if (step >= 0) {
    allTokens.set(tokenSteps.subarray(step * length, (step + 1) * length));
    headCounts.set(headSteps.subarray(step * numHeads, (step + 1) * numHeads));
    return;
  }
  allTokens.fill(0);
  for (let row = 0; row < numHeads; row++) headCounts[row] = addHead(row, state.percent, allTokens);
}
function countShown() {
  if (!isFiltered()) { shownTokens.set(allTokens); return; }
  shownTokens.fill(0);
  for (let row = 0; row < numHeads; row++) if (isShown(row)) addHead(row, state.percent, shownTokens);
}
const shownPairs = () => (state.layer < 0 ? layers.length : 1) * (state.head < 0 ? heads : 1);

// ---- the bar --------------------------------------------------------------------------------------------------------
function setUpBar() {
  const input = $("ratio");
  input.min = Math.min(5, stored);
  const place = (percent) => (percent - input.min) / (100 - input.min);
  $("mark").parentNode.style.setProperty("--at", place(stored));
  input.disabled = !canSlide;
  const exact = data.agreement === null ? "" : ` At ${stored}\u00a0% the ranks place ${share1(data.agreement)} of the pairs as the file does.`;
  $("bar-note").textContent = canSlide
    ? `At ${stored}\u00a0% this is the file as it is. Other ratios show what a file of that ratio would keep, from the rank of each pair.${exact}`
    : numHeads ? "This file holds no ranks, so other keep ratios can’t be shown." : "No full-attention layers: nothing was compressed.";
  input.addEventListener("input", () => change({ percent: snap(Number(input.value)) }));
  $("reset").addEventListener("click", () => change({ percent: stored }));
  $("bar").addEventListener("submit", (event) => event.preventDefault());
  return place;
}
function snap(percent) {
  if (!canSlide) return stored;
  if (!tokenSteps) return percent;
  return [stored, ...data.steps].reduce((best, step) => (Math.abs(step - percent) < Math.abs(best - percent) ? step : best));
}
const live = (id, main, more) => $(id).replaceChildren(main + " ", make("small", "", more));
function drawBar() {
  let kept = 0, gone = 0;
  const keptStored = state.percent === stored;
  for (const count of headCounts) kept += count;
  for (const count of allTokens) if (count === 0 && numHeads) gone++;
  const nbytes = data.nbytes + (kept - data.storedPairs) * data.pairBytes, input = Object.assign($("ratio"), { value: state.percent });
  input.setAttribute("aria-valuetext", `${state.percent} percent${keptStored ? ", as stored" : ""}`);
  input.parentNode.style.setProperty("--p", place(state.percent));
  $("percent").textContent = state.percent + "\u00a0%";
  $("reset").textContent = keptStored ? "as stored" : `back to ${stored}\u00a0%`;
  $("reset").disabled = keptStored;
  live("pairs", numPairs ? share1(kept / numPairs) : "–", `${number(kept)} of ${number(numPairs)}`);
  live("size", (keptStored ? "" : "≈\u00a0") + size(nbytes), `of ${size(data.fullBytes)}`);
  live("evicted", `${number(gone)} ${gone === 1 ? "token" : "tokens"}`, `of ${number(length)} (${share1(gone / Math.max(1, length))})`);
}

// ---- the heat map ---------------------------------------------------------------------------------------------------
const cells = [];
function setUpMap() {
  const map = $("map");
  map.style.setProperty("--heads", heads);
  map.classList.toggle("few", heads <= 4);
  map.append(make("span", "row", ""));
  for (let h = 0; h < heads; h++) map.append(make("span", "row", String(h)));
  layers.forEach((layer, l) => {
    map.append(make("span", l % 5 ? "odd" : "", String(layer)));
    for (let h = 0; h < heads; h++) {
      const cell = make("button");
      cell.type = "button";
      cell.tabIndex = cells.length ? -1 : 0;
      cell.row = cells.push(cell) - 1;
      map.append(cell);
    }
  });
  const about = (event) => { const cell = event.target.closest("button"); if (cell) showTip(cell, ...aboutHead(cell.row)); };
  for (const name of ["pointerover", "focusin"]) map.addEventListener(name, about);
  for (const name of ["pointerleave", "focusout"]) map.addEventListener(name, hideTip);
  map.addEventListener("click", (event) => { const cell = event.target.closest("button"); if (cell) choose(cell.row); });
  map.addEventListener("keydown", moveInMap);
  if (cells.length) new ResizeObserver(measureMap).observe(map);
  drawLegend();
}
const layersAcross = () => getComputedStyle($("map")).gridAutoFlow.startsWith("column");
function measureMap() {
  $("map").classList.toggle("tight", cells[0].offsetWidth < 26);
  $("map").classList.toggle("dense", cells[0].offsetWidth < 17);
  $("map-axis").textContent = layersAcross() ? "Layers from left to right, heads from top to bottom" : "Layers from top to bottom, heads from left to right";
}
function moveInMap(event) {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!step || event.target.row === undefined) return;
  event.preventDefault();
  const [dl, dh] = layersAcross() ? step : [step[1], step[0]];
  const l = Math.floor(event.target.row / heads) + dl, h = event.target.row % heads + dh;
  if (l < 0 || l >= layers.length || h < 0 || h >= heads) return;
  event.target.tabIndex = -1;
  cells[l * heads + h].tabIndex = 0;
  cells[l * heads + h].focus();
}
function choose(row) {
  if (!canFilter) return;
  const layer = Math.floor(row / heads), head = row % heads;
  const again = state.layer === layer && state.head === head;
  change(again ? { layer: -1, head: -1 } : { layer, head });
}
function aboutHead(row) {
  const kept = headCounts[row];
  return [`Layer ${layers[Math.floor(row / heads)]}, head ${row % heads}`,
    `${number(kept)} of ${number(length)} pairs kept (${share1(kept / Math.max(1, length))})`];
}
function drawMap() {
  cells.forEach((cell, row) => {
    const share = headCounts[row] / Math.max(1, length), chosen = isFiltered() && isShown(row);
    if (cell.count === headCounts[row] && cell.chosen === chosen) return;
    [cell.count, cell.chosen] = [headCounts[row], chosen];
    cell.className = `s${level(share)}${chosen ? " on" : ""}`;
    cell.textContent = label(share);
    cell.setAttribute("aria-label", aboutHead(row).join(": "));
    if (canFilter) cell.setAttribute("aria-pressed", chosen);
  });
}
function drawLegend() {
  for (const legend of document.querySelectorAll(".legend")) {
    legend.append(make("b", "s0", "none"));
    for (let i = 1; i <= LEVELS; i++) legend.append(make("b", `s${i}`, String(Math.round(100 * i / LEVELS))));
    legend.append(make("span", "", "share of pairs kept, up to that percent"));
  }
}

// ---- by token, along the text ---------------------------------------------------------------------------------------
function drawBins() {
  const counts = new Array(BINS + 1).fill(0), total = Math.max(1, shownPairs());
  for (const kept of shownTokens) counts[Math.ceil(kept * BINS / total)]++;
  const most = Math.max(1, ...counts);
  const nodes = counts.map((count, i) => {
    const bin = make("div", "bin"), column = make("div"), bar = make("i");
    bar.style.height = `${(count / most * 88).toFixed(2)}%`;
    column.append(make("em", "", count >= 10000 ? Math.round(count / 1000) + "k" : String(count)), bar);
    bin.append(column, make("span", "", i === 0 ? "none" : "≤" + i * 100 / BINS));
    return bin;
  });
  $("bins").replaceChildren(...nodes);
  $("bins").setAttribute("aria-label", "Tokens by share kept: " + counts.map((n, i) => `${i ? `up to ${i * 10} percent` : "none"} ${n}`).join(", "));
}
function drawAlong() {
  const count = Math.min(length, 200), total = Math.max(1, shownPairs());
  let path = "M0 100", sum = 0;
  for (let bin = 0; bin < count; bin++) {
    const from = Math.floor(bin * length / count), to = Math.floor((bin + 1) * length / count);
    let kept = 0;
    for (let t = from; t < to; t++) kept += shownTokens[t];
    sum += kept;
    path += `V${(100 - 100 * kept / total / (to - from)).toFixed(2)}H${bin + 1}`;
  }
  const mean = 100 - 100 * sum / total / Math.max(1, length);
  drawAlong.area.setAttribute("d", path + "V100Z");
  drawAlong.mean.setAttribute("d", `M0 ${mean}H${count}`);
  $("along").setAttribute("aria-label", `Mean share kept along the text, ${(100 - mean).toFixed(1)} percent overall`);
}
function setUpAlong() {
  const space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg"), count = Math.min(length, 200);
  svg.setAttribute("viewBox", `0 0 ${Math.max(1, count)} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  const paths = ["line", "area", "line mean"].map((name) => {
    const path = document.createElementNS(space, "path");
    path.setAttribute("class", name);
    return path;
  });
  paths[0].setAttribute("d", `M0 0H${count}M0 50H${count}M0 100H${count}`);
  [, drawAlong.area, drawAlong.mean] = paths;
  svg.append(...paths);
  $("along").append(svg);
  for (const percent of [0, 50, 100]) {
    const mark = make("span", "", percent + " %");
    mark.style.top = `${100 - percent}%`;
    $("along").append(mark);
  }
  $("last").textContent = number(length);
  $("along").addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    const token = Math.max(0, Math.min(length - 1, Math.floor((event.clientX - box.left) / box.width * length)));
    const unit = units.findIndex((u) => u.stop > token);
    if (unit >= 0) goTo(unit);
  });
}

// ---- the text -------------------------------------------------------------------------------------------------------
// A unit is what shows as one piece: a token, or the tokens that together spell one character.
const units = [], blocks = [];
let current = -1;
function setUpText() {
  for (let start = 0, t = 0; t < length; t++) {
    if (!texts[t] && t < length - 1) continue;
    units.push({ start, stop: t + 1, text: texts[t] });
    start = t + 1;
  }
  const body = $("text");
  let block = null;
  units.forEach((unit, i) => {
    if (!block) blocks.push(block = { node: make("div"), from: i, to: i, stale: true, seen: false });
    const [, space, word] = unit.text.match(/^([ \t]*)([^]*)$/);
    if (word) block.node.append(space);
    unit.node = make("span", "", word || space);
    unit.node.unit = i;
    unit.newline = /^\n+$/.test(unit.text) ? " nl" : "";
    block.node.append(unit.node);
    block.to = i + 1;
    if (unit.text.endsWith("\n") && block.to - block.from >= BLOCK_LEN) block = null;
  });
  body.append(...blocks.map((b) => b.node));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const seen = blocks[entry.target.block];
      seen.seen = entry.isIntersecting;
      if (seen.seen && seen.stale) drawBlock(seen);
    }
  }, { rootMargin: "800px 0px" });
  blocks.forEach((b, i) => { b.node.block = i; watch.observe(b.node); });
  for (const name of ["pointerover", "click"]) {
    body.addEventListener(name, (event) => { if (event.target.unit >= 0) mark(event.target.unit); });
  }
  body.addEventListener("pointerleave", () => mark(-1));
  body.addEventListener("blur", () => mark(-1));
  body.addEventListener("keydown", moveInText);
  setMono((texts.join("").match(/\n(\t| {2,})\S/g) || []).length > length / 60); // many indented lines: code
  $("mono").addEventListener("click", () => setMono($("mono").getAttribute("aria-pressed") !== "true"));
}
function setMono(on) {
  $("mono").setAttribute("aria-pressed", $("text").classList.toggle("mono", on));
}
function drawBlock(block) {
  const total = Math.max(1, shownPairs());
  for (let i = block.from; i < block.to; i++) {
    const unit = units[i];
    let kept = 0;
    for (let t = unit.start; t < unit.stop; t++) kept += shownTokens[t];
    const name = `s${numHeads ? level(kept / total / (unit.stop - unit.start)) : LEVELS}${unit.newline}${i === current ? " at" : ""}`;
    if (unit.name !== name) unit.node.className = unit.name = name;
  }
  block.stale = false;
}
function drawText() {
  for (const block of blocks) { block.stale = true; if (block.seen) drawBlock(block); }
}
/** Makes a unit the current one, outlines it and shows what is known of it; -1 for none. */
function mark(index) {
  if (units[current]) { units[current].node.classList.remove("at"); units[current].name = null; }
  current = index;
  const unit = units[index];
  if (!unit) { hideTip(); return; }
  unit.node.classList.add("at");
  unit.name = null;
  const spelled = unit.stop - unit.start, of = shownPairs() * spelled;
  let kept = 0;
  for (let t = unit.start; t < unit.stop; t++) kept += shownTokens[t];
  const which = spelled > 1 ? `Tokens ${number(unit.start + 1)}–${number(unit.stop)}, one character` : `Token ${number(unit.stop)}`;
  showTip(unit.node, JSON.stringify(unit.text).slice(1, -1).trim() || "space",
    `${which} of ${number(length)}, position ${number(data.prefix + unit.start)}`,
    numHeads ? `${number(kept)} of ${number(of)} pairs kept (${share1(kept / of)})` : "not compressed");
}
function goTo(index) {
  units[index].node.scrollIntoView({ block: "center" });
  requestAnimationFrame(() => mark(index));
}
function moveInText(event) {
  const to = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: units.length - 1 }[event.key];
  if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const index = Math.max(0, Math.min(units.length - 1, to));
  units[index].node.scrollIntoView({ block: "nearest" });
  mark(index);
}
function showTip(node, title, ...lines) {
  const tip = $("tip");
  tip.replaceChildren(make("b", "", title), ...lines.map((line) => make("div", "", line)));
  tip.hidden = false;
  const box = (node.getClientRects()[0] || node.getBoundingClientRect()), own = tip.getBoundingClientRect();
  const x = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - own.width - 8));
  const below = box.bottom + 8 + own.height < window.innerHeight;
  tip.style.transform = `translate(${Math.round(x)}px, ${Math.round(below ? box.bottom + 8 : box.top - own.height - 8)}px)`;
}
function hideTip() { $("tip").hidden = true; }

// ---- state ----------------------------------------------------------------------------------------------------------
let frame = 0, saving = 0;
/** Takes over the given parts of the state, and redraws once in the next frame. */
function change(parts) {
  Object.assign(state, parts);
  if (!frame) frame = requestAnimationFrame(draw);
  clearTimeout(saving);
  saving = setTimeout(writeHash, 250);
}
function draw() {
  frame = 0;
  countAll();
  countShown();
  drawBar();
  drawMap();
  drawBins();
  drawAlong();
  drawText();
  $("layer").value = state.layer;
  $("head").value = state.head;
  const scope = (state.layer < 0 ? "" : `  layer ${layers[state.layer]}`) + (state.head < 0 ? "" : `  head ${state.head}`);
  for (const node of document.querySelectorAll(".scope")) node.textContent = scope && `${scope} only`;
}
function setUpFilter() {
  const fill = (select, names, change) => {
    select.append(new Option("all", -1), ...names.map((name, i) => new Option(String(name), i)));
    select.disabled = !canFilter;
    if (!canFilter && numHeads) select.title = "This context is too large to store each head’s ranks in the page";
    select.addEventListener("change", () => change(Number(select.value)));
  };
  fill($("layer"), layers, (layer) => change({ layer }));
  fill($("head"), Array.from({ length: heads }, (_, h) => h), (head) => change({ head }));
}
/** The address holds the state: #r=0.3, and &layer=5, &head=1 where one is chosen. */
function readHash() {
  const hash = new URLSearchParams(location.hash.slice(1)), r = Number(hash.get("r"));
  const pick = (name, list) => (canFilter && hash.has(name) ? list.indexOf(Number(hash.get(name))) : -1);
  const percent = r > 0 && r <= 1 ? Math.max(Number($("ratio").min), Math.round(100 * r)) : stored;
  return { percent: snap(percent), layer: pick("layer", layers), head: pick("head", Array.from({ length: heads }, (_, h) => h)) };
}
function writeHash() {
  const parts = [];
  if (state.percent !== stored) parts.push(`r=${state.percent / 100}`);
  if (state.layer >= 0) parts.push(`layer=${layers[state.layer]}`);
  if (state.head >= 0) parts.push(`head=${state.head}`);
  try {
    history.replaceState(null, "", parts.length ? "#" + parts.join("&") : location.pathname + location.search);
  } catch { /* some browsers refuse this for local files; the page works without it */ }
}
const place = setUpBar();
setUpMap();
setUpAlong();
setUpFilter();
setUpText();
Object.assign(state, readHash());
draw();
window.addEventListener("hashchange", () => change(readHash()));
