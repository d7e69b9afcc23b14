// A sweep's board: one clock for all its clips, and one mark for all that shows the same point. The same module runs in
// a widget, whose model keeps frame, playing and chosen, and in a page without a kernel.

const act = {
  play: (at) => ({ playing: !at.playing }),
  back: (at) => ({ playing: false, frame: at.frame - 1 }),
  next: (at) => ({ playing: false, frame: at.frame + 1 }),
};

function bring(root, model) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const at = { frame: 0, playing: !still, chosen: root.dataset.chosen };
  if (model) for (const name of Object.keys(at)) at[name] = model.get(name) ?? at[name];
  if (still) at.playing = false;
  const find = (what) => root.querySelector(what);
  const all = (what) => [...root.querySelectorAll(what)];
  const frames = Number(root.dataset.frames);
  const slider = find("input[type=range]");
  find(".clock").hidden = false;

  const draw = () => {
    for (const film of all(".film")) {
      const [count, columns, rows] = ["frames", "columns", "rows"].map((name) => Number(film.dataset[name]));
      const i = Math.min(at.frame, count - 1); // a shorter clip holds its last frame
      const [x, y] = [(i % columns) / columns, Math.floor(i / columns) / rows];
      film.firstElementChild.style.transform = `translate(${-100 * x}%, ${-100 * y}%)`;
      film.dataset.frame = i;
    }
    slider.value = at.frame;
    slider.setAttribute("aria-valuetext", `frame ${at.frame + 1} of ${frames}`);
    find("output").textContent = `frame ${at.frame + 1} of ${frames}`;
    find("[data-act=play]").textContent = at.playing ? "Pause" : "Play";
  };

  const mark = () => {
    for (const one of all("[data-point]")) {
      const marked = one.dataset.point === at.chosen;
      if (one.matches("button")) one.setAttribute("aria-pressed", marked);
      one.classList.toggle("marked", marked);
    }
    for (const detail of all("[data-detail]")) {
      detail.hidden = detail.dataset.detail !== at.chosen;
      const large = detail.querySelector(".large");
      if (!detail.hidden && large && !large.childElementCount)
        large.append(...all(`button[data-point="${at.chosen}"] .film`).map((film) => film.cloneNode(true)));
    }
  };

  const set = (change) => {
    Object.assign(at, change);
    at.frame = (at.frame + frames) % frames;
    if (model) {
      for (const name of ["playing", "chosen"]) model.set(name, at[name]);
      if (!at.playing) model.set("frame", at.frame); // not seven messages a second
      model.save_changes();
    }
    draw();
  };

  root.addEventListener("click", (event) => {
    const point = event.target.closest("[data-point]");
    const button = event.target.closest("[data-act]");
    if (point) set({ chosen: point.dataset.point });
    if (point) mark();
    if (button) set(act[button.dataset.act](at));
    if (point || button) draw();
  });
  slider.addEventListener("input", () => set({ playing: false, frame: Number(slider.value) }));
  const clock = setInterval(() => {
    if (!root.isConnected) return;
    if (at.playing) at.frame = (at.frame + 1) % frames;
    if (at.playing) draw();
  }, 1000 / Number(root.dataset.fps));
  mark();
  draw();
  const heard = () => {
    for (const name of Object.keys(at)) at[name] = model.get(name) ?? at[name];
    mark();
    draw();
  };
  model?.on("change:frame change:playing change:chosen", heard);
  return () => {
    clearInterval(clock);
    model?.off("change:frame change:playing change:chosen", heard);
  };
}

function render({ model, el }) {
  let end = () => {};
  const show = () => {
    end();
    end = () => {};
    const focused = document.activeElement?.closest?.("[data-point], [data-act]");
    const [key] = focused && el.contains(focused) ? Object.entries(focused.dataset) : [];
    el.innerHTML = model.get("html");
    if (el.firstElementChild) end = bring(el.querySelector(".svdlab-board"), model);
    // What is drawn anew while clips come keeps the keyboard where it was.
    if (key) el.querySelector(`button[data-${key[0]}="${key[1]}"]`)?.focus();
  };
  model.on("change:html", show);
  show();
  return () => end();
}

for (const root of document.querySelectorAll("section.svdlab-board:not([data-alive])")) {
  root.dataset.alive = ""; // in a page without a kernel
  bring(root);
}

export default { render };
