// A cloud of points that is turned by dragging, moved by dragging with shift, and brought nearer by the wheel. Plain WebGL.
"use strict";
for (const box of document.querySelectorAll(".cloud")) {
  const canvas = box.querySelector("canvas");
  const gl = canvas.getContext("webgl", { antialias: true, preserveDrawingBuffer: true });
  if (!gl) {
    box.querySelector(".hint").textContent = "This browser shows no WebGL, so the cloud cannot be drawn.";
    continue;
  }
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const clouds = JSON.parse(box.querySelector("script").textContent).map((cloud) => ({
    name: cloud.name,
    places: new Int16Array(bytes(cloud.places).buffer),
    colours: bytes(cloud.colours),
  }));

  const compile = (type, source) => {
    const shader = gl.createShader(type);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
    return shader;
  };
  const program = gl.createProgram();
  gl.attachShader(program, compile(gl.VERTEX_SHADER, `
    attribute vec3 place; attribute vec3 colour; varying vec3 shade;
    uniform mat3 turn; uniform vec2 shift; uniform float distance; uniform float aspect; uniform float size;
    void main() {
      vec3 p = turn * place;
      float depth = distance - p.z;
      gl_Position = vec4(2.2 * (p.x + shift.x) / aspect, 2.2 * (p.y + shift.y), 1.01 * depth - 0.2, depth);
      gl_PointSize = size / depth;
      shade = colour;
    }`));
  gl.attachShader(program, compile(gl.FRAGMENT_SHADER, `
    precision mediump float; varying vec3 shade;
    void main() { gl_FragColor = vec4(shade, 1.0); }`));
  gl.linkProgram(program);
  gl.useProgram(program);
  gl.enable(gl.DEPTH_TEST);

  const uniform = (name) => gl.getUniformLocation(program, name);
  const feed = (name, data, type) => {
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, data, gl.STATIC_DRAW);
    const at = gl.getAttribLocation(program, name);
    gl.enableVertexAttribArray(at);
    gl.vertexAttribPointer(at, 3, type, true, 0, 0);
  };
  let shown = 0, count = 0;
  const show = (index) => {
    shown = index;
    count = clouds[index].places.length / 3;
    feed("place", clouds[index].places, gl.SHORT);
    feed("colour", clouds[index].colours, gl.UNSIGNED_BYTE);
    for (const button of box.querySelectorAll("button")) button.setAttribute("aria-pressed", button.dataset.cloud == index);
    draw();
  };

  // view.yaw and view.pitch in radians; the state is readable from outside, for tests and for links to a view.
  const view = { yaw: 0.35, pitch: 0.25, x: 0, y: 0, distance: 1.1 };
  box.view = view;
  const draw = () => {
    const scale = window.devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * scale;
    canvas.height = canvas.clientHeight * scale;
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clearColor(0.09, 0.1, 0.12, 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    const [a, b] = [Math.cos(view.yaw), Math.sin(view.yaw)];
    const [c, d] = [Math.cos(view.pitch), Math.sin(view.pitch)];
    gl.uniformMatrix3fv(uniform("turn"), false, [a, b * d, -b * c, 0, c, d, b, -a * d, a * c]);
    gl.uniform2f(uniform("shift"), view.x, view.y);
    gl.uniform1f(uniform("distance"), view.distance);
    gl.uniform1f(uniform("aspect"), canvas.width / canvas.height);
    gl.uniform1f(uniform("size"), 0.016 * canvas.height);
    gl.drawArrays(gl.POINTS, 0, count);
  };

  canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    if (!event.buttons) return;
    if (event.shiftKey) {
      view.x += (event.movementX * view.distance) / (1.1 * canvas.clientHeight);
      view.y -= (event.movementY * view.distance) / (1.1 * canvas.clientHeight);
    } else {
      view.yaw += event.movementX * 0.008;
      view.pitch = Math.max(-1.5, Math.min(1.5, view.pitch + event.movementY * 0.008));
    }
    draw();
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    view.distance = Math.max(0.4, Math.min(8, view.distance * Math.exp(event.deltaY * 0.001)));
    draw();
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const turn = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] }[event.key];
    if (!turn) return;
    event.preventDefault();
    view.yaw += turn[0];
    view.pitch += turn[1];
    draw();
  });
  for (const button of box.querySelectorAll("button")) button.addEventListener("click", () => show(Number(button.dataset.cloud)));
  new ResizeObserver(draw).observe(canvas);
  show(0);
}
