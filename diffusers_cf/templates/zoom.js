// A click on a picture doubles the size of all pictures around the point clicked, up to 4 times; the next one resets it.
let scale = 1, origin = [0.5, 0.5];
element.addEventListener("click", (event) => {
  const picture = event.target.closest(".cf-image");
  if (!picture) return;
  const box = picture.getBoundingClientRect(), next = scale < 4 ? 2 * scale : 1;
  const at = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  const seen = at.map((part, axis) => origin[axis] + (part - origin[axis]) / scale);
  origin = at.map((part, axis) => (next > 1 ? (part - seen[axis] * next) / (1 - next) : 0.5));
  scale = next;
  element.style.setProperty("--cf-zoom", scale);
  element.style.setProperty("--cf-origin", origin.map((part) => `${100 * part}%`).join(" "));
});
